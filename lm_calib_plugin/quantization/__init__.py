"""Quantization: grids and how weights are rounded to them."""
