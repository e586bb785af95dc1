"""What is seen of a run: numbers, anomalies, silence, trackers, traces."""
