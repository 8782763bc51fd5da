"""Every file that one process hands to another: table schemas, records, the recipe, and how files are put
on disk.

Imports nothing of the rooms above it (`ple_data`, `ple_train`, `cli`).
"""
