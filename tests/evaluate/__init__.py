"""Tests of evaluation; a package, so that they share the tiny models of `conftest.py`."""
