"""What came of it, for people and for machines."""

from mka_export.report.document import valid_report, write_report
from mka_export.report.machine import print_forecast, print_machine
from mka_export.report.terminal import print_report

__all__ = ["print_forecast", "print_machine", "print_report", "valid_report", "write_report"]
