"""One file per way to answer a request."""
