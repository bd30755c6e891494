"""Programs: each file is one, run from a clone as `python -m launch.NAME`."""
