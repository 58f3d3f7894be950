"""The main job from end to end on real handwritten digits: train experts, merge them, measure, compare.

Read `demo.py` first; `domains.py` says what the experts are experts of.
"""
