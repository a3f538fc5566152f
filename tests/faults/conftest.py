"""Faults as a user meets them: a command is typed, one line comes back, and nothing else has changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command import type_in
from fault_tools import DONE, LOOSE, MERGE, SMALL, contents

Refused = Callable[..., str]


@pytest.fixture
def model(pico_llama: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own, to be damaged."""
    return Path(shutil.copytree(pico_llama, tmp_path / "model"))


@pytest.fixture(scope="session")
def published(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with an artifact in it, from an earlier run that went well."""
    out = tmp_path_factory.mktemp("faults") / "out"
    result = type_in(pico_llama, *MERGE, "--to", "gguf-q8", "--out", out, *SMALL, *LOOSE, "--quiet")
    assert result.exit_code in DONE, result.output
    return out


@pytest.fixture
def refused(published: Path, tmp_path: Path) -> Refused:
    """``refused(arguments, *words, code=1)``: type a command whose fault is told in one line that has ``words``.

    ``{out}`` among the arguments is a folder with an earlier result, which the command must leave as it was.
    """

    def run(arguments: list[object], *words: str, code: int = 1) -> str:
        out = Path(shutil.copytree(published, tmp_path / "earlier", dirs_exist_ok=True))
        before = contents(out)
        result = type_in(*(str(a).format(out=out) for a in arguments))
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        line = result.stderr.strip().splitlines()[-1]
        for word in words:
            assert word in line, line
        assert line.startswith(("mka-export: ", "Error: "))
        assert result.stdout == ""
        assert contents(out) == before
        return line

    return run
