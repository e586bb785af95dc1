"""The loop, its schedule, its run directory, and scoring."""
