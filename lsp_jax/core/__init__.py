"""Errors, files, console, the JAX runtime, several processes: under everything, and unaware of the game."""
