"""What people look at: Markdown, tables for machines, plots and one page, from an Analysis."""

from lm_calib_plugin.leaderboard.report.writing import write_report

__all__ = ["write_report"]
