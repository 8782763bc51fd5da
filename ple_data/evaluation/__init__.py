"""Policies compared: their answers, and what they are worth."""
