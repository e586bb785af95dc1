"""Data, models, training, evaluation."""
