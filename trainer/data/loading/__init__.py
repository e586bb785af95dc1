"""From the parts of a dataset to batches of tensors."""
