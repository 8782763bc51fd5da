"""The whole job on a toy world."""
