"""The backbone under DeepSpeed, and its state by parameter name."""
