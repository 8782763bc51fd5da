"""The model that is trained: the only rooms that load, wrap and save it."""
