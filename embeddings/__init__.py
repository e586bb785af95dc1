"""The sparse side: ids, sharded tables, frozen vectors. Knows nothing of training or of language models."""

from importlib.util import find_spec

from embeddings.versions import check_triple

# Where neither is installed there can be no table, and what needs none (the meta layer's profile, which
# takes medians and the machine's name from here) shall run: on a GPU machine with torch and triton alone.
if find_spec("torchrec") or find_spec("fbgemm_gpu"):
    check_triple()
