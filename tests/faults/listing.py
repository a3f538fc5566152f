"""Print docs/faults.md: every fault that is tested, told by the tests themselves.

python tests/faults/listing.py > docs/faults.md

A module's docstring is a heading; a test's docstring, its parameters, or both are the fault in words; and the
name, ``test_refused...`` or ``test_survived...``, says how it ends.
"""

from __future__ import annotations

import contextlib
import io
import re
from itertools import groupby
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
NAME = re.compile("test_(refused|survived)")
HEAD = """# Faults

What can go wrong, and the test that shows what then happens: {count} faults. Made by `python tests/faults/listing.py`.

**Refused**: one line says what is wrong and where, and what to do; the exit code is not 0; nothing is published, and
earlier results are as they were. **Survived**: the result is the right one, now or when the same command is run again,
or only the one target fails. The tests marked *minutes* are run with `-m real`. `benchmarks/kill.py` kills real commands
at random instants: 50 of 50 ended in the same plan and artifact.
"""


class Collected:
    """A plugin of pytest that keeps what is collected."""

    items: list[pytest.Item]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = session.items


def collect() -> list[pytest.Function]:
    """Return the tests of faults, the long ones too, by module."""
    collected = Collected()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main(["--collect-only", "-n", "0", "-m", "", str(FOLDER)], plugins=[collected])
    if code:
        raise SystemExit(said.getvalue())
    return [item for item in collected.items if isinstance(item, pytest.Function)]


def line(test: pytest.Function) -> str:
    """Return a test's line in the table of its module."""
    told, parameters = (test.function.__doc__ or "").strip(), ""
    if call := getattr(test, "callspec", None):
        values = list(call.params.values())
        parameters = ", ".join(values) if all(isinstance(value, str) for value in values) else call.id
    fault = f"{told} ({parameters})" if told and parameters else told or parameters
    ends = NAME.match(test.name)
    if not ends or not fault:
        raise SystemExit(f"{test.nodeid}: its name or docstring does not tell the fault")
    minutes = ", minutes" if test.get_closest_marker("real") else ""
    return f"| {fault} | {ends[1]}{minutes} | `{test.name}` |".replace("\\", "\\\\")


def main() -> None:
    """Print the page."""
    tests = collect()
    print(HEAD.format(count=len(tests)))
    for module, group in groupby(tests, key=lambda test: test.module):
        print(f"## {module.__doc__.strip()}\n")
        print(f"`tests/faults/{Path(module.__file__).name}`\n")
        print("| fault | how it ends | test |\n|---|---|---|")
        print("\n".join(map(line, group)), end="\n\n")


if __name__ == "__main__":
    main()
