"""`python -m island_fast.bench`: speed, measured against what people would use instead.

Imports anything; imported by nothing.
"""
