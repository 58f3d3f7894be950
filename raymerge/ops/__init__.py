"""Pure tensor maths: torch in, torch out; no files, no model families, no Ray.

Read `selection.py` first: it shows how exact order statistics are found in a stream of chunks,
which most of the methods build on.
"""
