"""What a policy is worth, by its log-probabilities and its answers."""
