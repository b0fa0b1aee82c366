"""The report: a page about the cohort and a page per scan, self-contained and offline."""

from pipelines.report.write import Written, write_report

__all__ = ["Written", "write_report"]
