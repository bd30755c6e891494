"""What `launch.sweep` and `launch.worker` are made of."""
