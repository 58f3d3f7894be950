"""What happened in a run, as facts; later, pages made from them. Read `facts.py`."""
