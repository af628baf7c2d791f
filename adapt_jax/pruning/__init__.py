"""Which groups are removed from each layer, and how the remaining weights are adjusted."""
