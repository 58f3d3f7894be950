"""RayMerge: one checkpoint out of many fine-tuned ones, on a laptop or a Ray cluster."""

__version__ = "0.1.0"
