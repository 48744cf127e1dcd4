"""Scripted leaderboards: a grid of cells, their records, honest statistics, a page to look at."""
