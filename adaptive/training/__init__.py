"""The training loop and what it needs: state, optimizer, step, checkpoints, metrics, and a run put together."""
