"""The one HTML file of a leaderboard: no network, no build step, everything inside."""

from lm_calib_plugin.leaderboard.report.page.document import render

__all__ = ["render"]
