"""English text out of Debian packages: how each format becomes plain prose."""
