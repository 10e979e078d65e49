"""Declared work and the state machines that bring it about."""
