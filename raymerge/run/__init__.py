"""The only room that imports ray or deepspeed: pools of workers, and what runs on them.

Read `merge.py` first; it runs a plan on a pool. `pool.py` is this process, `cluster.py` is Ray.
"""
