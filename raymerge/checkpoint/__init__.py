"""Checkpoints as streams of tensors: where they lie, what is in them, read and written range by range.

Read `header.py` (what a safetensors file says of itself), then `index.py` (a whole checkpoint).
"""
