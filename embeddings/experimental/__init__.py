"""Written from the libraries' sources and never run on the hardware that they need."""
