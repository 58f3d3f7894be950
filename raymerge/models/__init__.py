"""The only room that knows transformers: families, vocabularies, heads, loading.

transformers is imported inside functions, since most merges never need it. Read `blocks.py` first.
"""
