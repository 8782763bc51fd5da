"""Shards on disk: committed whole, claimed by one, checked by hash."""
