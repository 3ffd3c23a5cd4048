"""Adaptive-computation models in JAX and Flax: one training loop, one Pareto plot. See docs/design.md."""
