"""Converts texts to tokens for calibration, evaluation and training."""
