"""Training: from a recipe to rows, TRL's loss, checkpoints and a summary."""
