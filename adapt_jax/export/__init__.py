"""The forms of a result: written, read back and compared."""
