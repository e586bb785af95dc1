"""What compiles for a GPU and has never run on one; nothing here is chosen unless it is asked for by name."""
