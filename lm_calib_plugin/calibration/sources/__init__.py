"""Calibration sources: one file each, found through the registry by name."""
