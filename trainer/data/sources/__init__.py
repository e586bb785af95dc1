"""From a log to a dataset: public sources, one's own Parquet, the simulator, later days."""
