"""Training in low precision: data, optimizer, sharding, the step, the loop and its results."""
