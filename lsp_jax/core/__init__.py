"""Errors, files, console, the JAX runtime and multi-process helpers, independent of the algorithm."""
