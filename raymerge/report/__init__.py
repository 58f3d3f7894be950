"""What happened in a run: its facts, and one HTML page made of them. Read `page.py` first, then `collect.py`."""
