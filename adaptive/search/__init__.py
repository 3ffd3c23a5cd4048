"""Searching, for one question, how often each layer should run: plans, strategies, many searches side by side."""
