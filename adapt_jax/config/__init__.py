"""A run's options: declared once, built from recipes and checked."""
