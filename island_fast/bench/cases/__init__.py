"""What is measured: one file for each group of cases; `all_cases.py` lists them in their order."""
