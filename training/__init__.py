"""Training: one loop for every objective, its data order, checkpoints, metrics and tracking."""
