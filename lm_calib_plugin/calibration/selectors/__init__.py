"""Selectors: which sequences of a larger pool become the calibration set."""
