"""The sparse side: ids, sharded tables, frozen vectors. Knows nothing of training or of language models."""

from embeddings.versions import check_triple

check_triple()
