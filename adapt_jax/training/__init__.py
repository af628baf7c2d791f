"""Recovery training: loss, optimizer, step and loop."""
