"""``mka-export verify`` on folders that nobody vouches for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import Result
from command import type_in


def verify(folder: Path) -> Result:
    return type_in("verify", folder, "--quiet")


def test_verify_stays_in_the_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "merged").symlink_to(tmp_path / "outside")
    files = {"merged/secret": hashlib.sha256(b"x").hexdigest(), "merged/stage.json": "0", "\x1b[2J": "0"}
    (out / "manifest.json").write_text(json.dumps({"format": "mka-export/workspace", "files": files}))
    result = verify(out)
    assert result.stdout.splitlines() == [
        r"missing  \x1b[2J",
        "missing  merged/secret",
        "missing  merged/stage.json",
        "3 files, 3 not as they were made",
    ]


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, "holds no manifest.json"),
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ("[]", "is damaged"),
        ("{}", "no manifest of mka-export"),
        ('{"format": "mka-export/workspace", "files": {"a": 1}}', "no manifest of mka-export"),
        ('{"format": "mka-export/workspace", "files": {"../x": "0"}}', "outside its folder: ../x"),
        ('{"format": "mka-export/workspace", "files": {"/etc/passwd": "0"}}', "outside its folder"),
        ('{"format": "mka-export/workspace", "files": {"C:\\\\x": "0"}}', "outside its folder"),
    ],
)
def test_verify_refuses_what_is_no_manifest(manifest, words, tmp_path):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    result = verify(tmp_path)
    assert result.exit_code == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
