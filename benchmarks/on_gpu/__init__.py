"""The sections of benchmarks/gpu.py: each a room of its own that measures, writes its numbers and decides nothing."""
