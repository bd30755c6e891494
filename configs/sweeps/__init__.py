"""Sweeps: many experiments a file, each with a `get_sweep` and a docstring that prices it."""
