"""Ranks that act together: the process group, and the check that hosts are alike."""
