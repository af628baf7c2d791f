"""Which groups go from which layer, and how the others are adjusted."""
