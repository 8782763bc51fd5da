"""A whole recipe, stage by stage, each a process of its own."""
