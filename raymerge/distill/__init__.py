"""Progressive layer-wise distillation (ProDistill, arXiv:2502.12706): coefficients fitted block by block.

Read schedule.py first, then student.py. Knows neither files of checkpoints, nor Ray nor DeepSpeed: it is given
weights, an engine that takes optimizer steps, and a group of ranks.
"""
