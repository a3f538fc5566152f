"""The workflow in docs/ci.md, as GitHub would run it: its own commands, in bash, on a pico model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tomllib
import yaml
from command import type_in
from pico import REPOSITORY

PAGE = (REPOSITORY / "docs" / "ci.md").read_text(encoding="utf-8")
SMALL = "windows = 6\nwindow_tokens = 64\n"
EXPRESSION = re.compile(r"\$\{\{ *([\w.-]+) *\}\}")


def fenced(language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return str(block)


def steps(job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = WORKFLOW["jobs"][job]["steps"]
    return found


WORKFLOW: dict[Any, Any] = yaml.safe_load(fenced("yaml"))


@pytest.fixture(scope="module")
def repository(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository as the page has it, of pico models, and ``mka-export`` on the path."""
    folder = tmp_path_factory.mktemp("ci") / "repository"
    shutil.copytree(pico_llama, folder / "pico")
    small = ["--windows", "2", "--window-tokens", "16", "--quiet"]
    converted = ["convert", str(pico_llama), "--to", "gguf-f16", "--out", str(folder.parent / "made"), *small]
    assert type_in(*converted).exit_code in (0, 4)
    (made,) = (folder.parent / "made" / "gguf-f16").glob("*.gguf")
    config = fenced("toml")
    (artifact,) = tomllib.loads(config)["artifacts"]
    (folder / artifact["path"]).parent.mkdir()
    shutil.copy(made, folder / artifact["path"])
    (folder / "parity.toml").write_text(SMALL + config.replace('"qwen2.5-0.5b"', '"pico"'))
    command = folder.parent / "bin" / "mka-export"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "from mka_export.cli import main; main()" "$@"\n')
    command.chmod(0o755)
    return folder


def run(job: str, folder: Path, kind: str = "branch", **known: object) -> int:
    """Run the commands of a job up to the first that fails, and those that always run; returns its exit code."""
    path = f"{folder.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    summary = str(folder.parent / "summary.md")
    environment = {**os.environ, "PATH": path, "GITHUB_STEP_SUMMARY": summary, "GITHUB_REF_TYPE": kind}
    code = 0
    for step in steps(job):
        if "run" in step and not step["run"].startswith("pip install ") and (not code or "if" in step):
            script = EXPRESSION.sub(lambda found: str(known[found.group(1)]), step["run"])
            ended = subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment, check=False).returncode
            code = code or ended
    return code


def test_the_commands_of_the_page_measure_and_judge(repository: Path) -> None:
    shards = WORKFLOW["jobs"]["measure"]["strategy"]["matrix"]["shard"]
    for shard in shards:
        assert run("measure", repository, **{"matrix.shard": shard, "strategy.job-total": len(shards)}) == 0
    assert run("verdict", repository) == 0
    report = json.loads((repository / "parity-check" / "report.json").read_text())
    assert report["evaluation"]["windows"] == 6
    assert [target["verdict"] for target in report["targets"]] == ["pass"]
    assert (repository.parent / "summary.md").read_text() == (repository / "parity-check" / "summary.md").read_text()
    uploaded = [step["with"]["path"] for step in steps("verdict") if "upload-artifact" in step.get("uses", "")]
    assert all((repository / path).is_file() for path in uploaded[0].split())
    assert ElementTree.parse(repository / "parity-check" / "junit.xml").getroot().tag == "testsuites"


@pytest.mark.parametrize(
    ("code", "kind", "expected"), [(0, "tag", 0), (1, "branch", 1), (3, "branch", 3), (4, "branch", 0), (4, "tag", 4)]
)
def test_what_a_verdict_means(code: int, kind: str, expected: int, tmp_path: Path) -> None:
    command, folder = tmp_path / "bin" / "mka-export", tmp_path / "repository"
    command.parent.mkdir()
    command.write_text(f"#!/bin/sh\nmkdir -p parity-check; echo some > parity-check/summary.md; exit {code}\n")
    command.chmod(0o755)
    folder.mkdir()
    assert run("verdict", folder, kind) == expected
    assert (tmp_path / "summary.md").read_text() == "some\n"  # whatever the verdict is
    one = {"matrix.shard": 1, "strategy.job-total": 2}
    assert run("measure", folder, **one) == (1 if code == 1 else 0)  # a part's verdict is none


def test_what_is_installed_is_there() -> None:
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installs = [step["run"] for job in WORKFLOW["jobs"] for step in steps(job) if "pip install" in step.get("run", "")]
    assert len(installs) == len(WORKFLOW["jobs"])
    for install in installs:
        name, asked = re.fullmatch(r"pip install '([\w-]+)\[(\w+)\]'", install).groups()
        assert name == "mka-export"
        assert asked in extras
