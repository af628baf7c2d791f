"""New tokens from a model."""
