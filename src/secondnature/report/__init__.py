"""The report: a run directory becomes one HTML file and its JSON; the before/after table for the terminal.

Reads nothing but the run directory; no torch, no network (process D).
"""

from secondnature.report.page import write, write_many
from secondnature.report.run import ReportData, Run, read_run
from secondnature.report.table import before_after_table, markdown_table

__all__ = ["ReportData", "Run", "before_after_table", "markdown_table", "read_run", "write", "write_many"]
