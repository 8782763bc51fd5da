"""Queries in: files and hub datasets, dialogues, principles."""
