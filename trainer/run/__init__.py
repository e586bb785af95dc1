"""From a configuration to the live objects of a run."""
