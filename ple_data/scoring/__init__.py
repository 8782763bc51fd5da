"""The scoring stage, and what keeps rewards that were paid for."""
