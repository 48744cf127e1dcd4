"""Compressed models that are kept by the key of their recipe, so that nothing is done twice."""
