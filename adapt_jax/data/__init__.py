"""Texts to tokens: for calibration, evaluation and training."""
