"""The data side: queries, principles, generation, rewards, the store and the partition. Never trains."""
