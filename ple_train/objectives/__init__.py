"""The math on responses: what a micro-batch costs."""
