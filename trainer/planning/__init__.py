"""Plans a run on a cluster that is not there."""
