"""Compressed models that are kept, so that a second run loads them instead of compressing.

``record`` and ``shelf`` know files and import nothing heavy; ``request`` names what was asked,
``changes`` and ``grids`` describe what became of a model, ``store`` writes and reads one artifact,
``cache`` decides which of the two.
"""
