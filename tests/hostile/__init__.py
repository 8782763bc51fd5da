"""Inputs that are wrong on purpose: each must end in one clear sentence, or in a result that is right.

`python -m tests.hostile` (make hostile) tries all of them; `test_hostile.py` draws a sample for every CI run.
"""
