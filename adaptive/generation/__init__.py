"""Text from any sub-model: sampling, the loop over tokens, and text that comes a piece at a time."""
