"""A fleet in one process and in virtual time: the same nodes, on an in-memory fabric, with an engine that computes nothing real."""
