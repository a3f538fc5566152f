from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from mka_export.models.checkpoint_writer import copy_tokenizer
from mka_export.models.licence import Licence, licence_of

FILES = ("LICENSE", "LICENSE.txt", "NOTICE", "Notice.txt", "USE_POLICY.md", "LLAMA_ACCEPTABLE_USE_POLICY.md", "COPYING")


def card(folder: Path, front: str) -> Path:
    (folder / "README.md").write_text(f"---\n{front}\n---\n\n# A model\n", encoding="utf-8")
    return folder


def test_what_the_model_card_says(tmp_path: Path) -> None:
    front = "license: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: [en]"
    assert licence_of(card(tmp_path, front)) == Licence("other", "llama3", "LICENSE", {})
    assert licence_of(card(tmp_path, "license: [mit, apache-2.0]")).id == "mit"


def test_a_card_that_says_nothing_leaves_it_to_the_catalogue(tmp_path: Path) -> None:
    assert licence_of(tmp_path) == Licence()
    assert licence_of(tmp_path, "Apache-2.0") == Licence("apache-2.0")
    assert licence_of(card(tmp_path, "language: en"), "Qwen Research") == Licence("other", "Qwen Research")


@pytest.mark.parametrize(
    "front", ["license: [", "- a\n- list", "license: {a: b}", "license: 3", "license: ''", "!!python/name:os.system"]
)
def test_a_card_that_cannot_be_read_is_none(tmp_path: Path, front: str) -> None:
    assert licence_of(card(tmp_path, front)) == Licence()


def test_a_card_that_is_not_text_or_far_too_large_is_none(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---\nlicense: mit\n---\n")
    assert licence_of(tmp_path) == Licence()
    card(tmp_path, "license: mit\n" + "# x\n" * (1 << 19))
    assert licence_of(tmp_path) == Licence()


def test_licence_notice_and_use_policy_files_are_found_and_copied(tmp_path: Path) -> None:
    source, copy, other = (tmp_path / name for name in ("source", "copy", "other"))
    for folder in (source, copy, other):
        folder.mkdir()
    for name in FILES:
        (source / name).write_text(name)
    (source / "model.safetensors").write_text("weights")
    (other / "LICENSE").write_text("that of the package")
    (other / "THIRD").write_text("x")
    found = licence_of(source, files=[other / "THIRD"])
    assert set(found.files) == {*FILES, "THIRD"}
    assert found.to_dict()["files"]["NOTICE"] == hashlib.sha256(b"NOTICE").hexdigest()
    copy_tokenizer(source, copy)
    assert {path.name for path in copy.iterdir()} == set(FILES)
