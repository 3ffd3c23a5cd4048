"""What methods of dynamic depth share: signals of confidence, exits, visits of layers and the keys that they leave."""
