"""Writes models in the export formats, reads them back and compares them."""
