"""Predicted against measured times of real placements."""
