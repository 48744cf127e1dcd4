"""Pruning of whole parts: decoder blocks, their attention and MLP, heads and neurons."""
