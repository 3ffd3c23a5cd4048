"""Methods that leave out width (and, being nested, depth with it)."""
