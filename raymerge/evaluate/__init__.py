"""Measure models on labelled rows: tasks, metrics, and the table of what a merge kept.

Read `measure.py` first (one model on one task), then `table.py` (all tasks of a recipe).
"""
