"""What a model is, and where it may be cut."""
