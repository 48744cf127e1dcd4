"""Transforms: the same function in weights and activations that round better."""
