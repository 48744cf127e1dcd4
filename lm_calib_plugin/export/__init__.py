"""Compressed models as ordinary Hugging Face folders: written, described, checked, read."""
