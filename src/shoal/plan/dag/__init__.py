"""Models whose graph is not a chain: which operators run on which tier."""
