"""What `launch.analyze` is made of: checkpoints, points at which to look, rows."""
