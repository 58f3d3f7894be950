"""From a recipe and checkpoint headers to a frozen plan, and the one function that executes a shard of it.

Read `schema.py` first (what a plan is), then `build.py` (how it is made), then `execute.py`.
"""
