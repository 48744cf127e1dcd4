"""Pruning: which weights are removed, and what the others become."""
