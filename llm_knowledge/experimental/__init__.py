"""Written from a library's documentation and never run on the hardware that it needs."""
