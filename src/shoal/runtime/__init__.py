"""The serving core: sequences, steps and stages."""
