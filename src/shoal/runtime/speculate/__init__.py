"""Speculation: guess how an answer goes on, and have several guessed tokens checked in one lap of the pipeline."""
