"""Predictions, exact metrics, intervals, comparisons."""
