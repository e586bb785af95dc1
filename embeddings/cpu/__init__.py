"""Shortcuts through the libraries' CPU paths, which patch private parts; `sharding.shard` alone uses them."""
