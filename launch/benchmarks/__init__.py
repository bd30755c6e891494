"""What `launch.benchmark` measures: a suite a file, and what its contenders are made of."""
