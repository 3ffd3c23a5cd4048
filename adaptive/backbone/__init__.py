"""The plain model: a decoder-only transformer with nothing adaptive in it. Read layers, attention, transformer."""
