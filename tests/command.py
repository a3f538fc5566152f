"""The command as a user types it, in this process."""

from __future__ import annotations

from click.testing import CliRunner, Result

from mka_export.cli import main


def type_in(*arguments: object) -> Result:
    """Run ``mka-export`` with these arguments: what it printed, and its exit code."""
    return CliRunner().invoke(main, [str(each) for each in arguments])
