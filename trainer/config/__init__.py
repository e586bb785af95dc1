"""The one typed configuration of a run."""
