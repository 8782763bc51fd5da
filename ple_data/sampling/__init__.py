"""The sampling stage: what a round consists of, and its responses."""
