"""A run's files as one HTML page. See README.md."""

from lvtrain.report.page import write_report

__all__ = ["write_report"]
