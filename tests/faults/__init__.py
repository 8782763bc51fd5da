"""A disk that fails: every file operation of a stage is made to fail, to be cut short or lost, or to be its last.

`python -m tests.faults` (make faults) goes through all of them; `test_faults.py` draws a sample for every CI run.
"""
