"""What came of it, for people and for machines."""

from mka_export.report.card import CARDS, renew_cards, write_cards
from mka_export.report.document import valid_report, with_nulls
from mka_export.report.evaluation import print_evaluation
from mka_export.report.files import REPORT, REPORT_FILES, write_reports
from mka_export.report.machine import print_forecast, print_machine
from mka_export.report.methods import draw_methods, print_methods
from mka_export.report.terminal import print_json, print_loss, print_report

__all__ = [
    "CARDS",
    "REPORT",
    "REPORT_FILES",
    "draw_methods",
    "print_evaluation",
    "print_forecast",
    "print_json",
    "print_loss",
    "print_machine",
    "print_methods",
    "print_report",
    "renew_cards",
    "valid_report",
    "with_nulls",
    "write_cards",
    "write_reports",
]
