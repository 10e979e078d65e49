"""Shoal: unequal machines at the edge act as one inference service."""

__version__ = "0.1.0"
