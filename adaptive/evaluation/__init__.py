"""Measuring trained sub-models: quality, latency, the Pareto front, and the reports."""
