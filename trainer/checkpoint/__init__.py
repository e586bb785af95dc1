"""Checkpoints: the directory, the state in it, writing, restoring, starting from another model."""
