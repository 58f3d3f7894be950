"""What the user wants: the recipe's schema, its settings, and the mergekit YAML that maps onto it.

Read `schema.py` first, then `settings.py`.
"""
