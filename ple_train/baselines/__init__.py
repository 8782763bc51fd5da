"""Other methods on the same rows."""
