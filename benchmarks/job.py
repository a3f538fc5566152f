"""mka-export as a user runs it, for benchmarks."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

COMMAND = [sys.executable, "-c", "from mka_export.cli import main; main()"]
FINISHED = (0, 3, 4)  # exit codes: a verdict was reached, whatever it is


def report_of(*arguments: object) -> dict[str, Any]:
    """Run ``mka-export``; returns the report, or ends with what the command said where it reached no verdict."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments), "--json", "--quiet"], check=False, capture_output=True, text=True
    )
    if done.returncode not in FINISHED:
        sys.exit(done.stderr)
    report: dict[str, Any] = json.loads(done.stdout)
    return report
