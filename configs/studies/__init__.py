"""Studies, one sweep a file; their rows and verdicts are in docs/studies."""
