"""Methods that leave out layers, or repeats of a shared block."""
