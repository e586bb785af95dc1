"""The `profile` commands."""
