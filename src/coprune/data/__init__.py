"""Calibration and evaluation data: text, images, speech and pairs."""
