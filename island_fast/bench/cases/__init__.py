"""All cases, in one file for each group; `all_cases` lists them in their order.

Each file has a tuple `CASES`. A case is a function that gets a `Context` and yields rows and counters.
"""
