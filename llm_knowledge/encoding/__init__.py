"""The frozen language model: files, tokens, batches, hidden states, answers."""
