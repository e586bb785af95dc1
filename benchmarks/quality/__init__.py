"""Does the knowledge help? The study, its arms and its tables (docs/results/index.md)."""
