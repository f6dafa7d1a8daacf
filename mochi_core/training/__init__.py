"""Fine-tuning: clips to a dataset, the objective, the loop that minimises it, and what it leaves on disk."""
