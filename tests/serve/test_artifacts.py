"""What is listed on the page, what is offered, and what never leaves the folder."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from page import fake_gguf, fake_onnx, fake_out, fake_setup

from mka_export.needs import BROWSER_BUFFER
from mka_export.serve.artifacts import find_artifacts
from mka_export.serve.site import site_of


def test_artifacts_of_an_output_folder(tmp_path):
    gguf, onnx = find_artifacts(fake_out(tmp_path / "out"))
    assert (gguf.kind, gguf.name, gguf.target, gguf.obstacle) == ("gguf", "a b.gguf", "gguf-q4", "")
    assert (onnx.kind, onnx.name, onnx.target, onnx.obstacle) == ("onnx", "a-int4", "onnx-int4", "")
    assert sorted(onnx.files) == [
        "config.json",
        "genai_config.json",
        "onnx/model_q4.onnx",
        "onnx/model_q4.onnx_data",
        "tokenizer.json",
    ]
    assert onnx.nbytes == sum(path.stat().st_size for path in onnx.files.values())


def test_one_artifact_alone(tmp_path):
    (gguf,) = find_artifacts(fake_gguf(tmp_path / "some.gguf"))
    (onnx,) = find_artifacts(fake_onnx(tmp_path / "some-int4"))
    assert (gguf.name, onnx.name) == ("some.gguf", "some-int4")
    assert not gguf.obstacle + onnx.obstacle


def test_the_tag_follows_the_files(tmp_path):
    path = fake_gguf(tmp_path / "some.gguf")
    (before,) = find_artifacts(path)
    tag = before.tag
    path.write_bytes(b"GGUF, made again")
    (after,) = find_artifacts(path)
    assert after.tag != tag


@pytest.mark.parametrize(("nbytes", "offered"), [(BROWSER_BUFFER, True), (BROWSER_BUFFER + 1, False)])
def test_a_file_that_no_buffer_holds_is_listed_and_not_offered(nbytes, offered, tmp_path):
    out = fake_out(tmp_path / "out")
    for file in ("gguf-q4/a b.gguf", "onnx-int4/a-int4/onnx/model_q4.onnx_data"):
        with (out / file).open("r+b") as opened:
            opened.truncate(nbytes)  # takes no disk
    found = find_artifacts(out)
    assert [artifact.obstacle == "" for artifact in found] == [offered, offered]
    if not offered:
        assert found[0].obstacle == "a b.gguf is larger than 2 GiB, more than a browser holds in one buffer"
        site = site_of(found, fake_setup(tmp_path / "cache"))
        assert not any(path.startswith("/models/") for path in site)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "no settings for transformers.js"),
        (lambda folder: (folder / "config.json").write_text("["), "no settings for transformers.js"),
        (lambda folder: (folder / "config.json").unlink(), "no settings for transformers.js"),
        (lambda folder: shutil.rmtree(folder / "onnx"), "no graph in onnx/"),
    ],
)
def test_an_onnx_folder_that_the_page_cannot_open(damage, words, tmp_path):
    folder = fake_onnx(tmp_path / "some-int4")
    damage(folder)
    (artifact,) = find_artifacts(folder)
    assert words in artifact.obstacle


def test_no_gguf_but_in_name(tmp_path):
    path = tmp_path / "some.gguf"
    path.write_bytes(b"<html>")
    (artifact,) = find_artifacts(path)
    assert artifact.obstacle == "it is no GGUF file"


def link(path: Path, to: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(to)


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    out = fake_out(tmp_path / "out")
    secret = fake_gguf(tmp_path / "secret.gguf")
    link(out / "gguf-q4" / "linked.gguf", secret)
    link(out / "onnx-int4" / "a-int4" / "special_tokens_map.json", secret)
    link(out / "onnx-int4" / "a-int4" / "onnx" / "model_q4.onnx_data", secret)
    link(out / "onnx-int4" / "elsewhere-int4", fake_onnx(tmp_path / "elsewhere-int4"))
    link(out / "elsewhere", fake_out(tmp_path / "other") / "gguf-q4")
    gguf, onnx = find_artifacts(out)
    assert (gguf.name, onnx.name) == ("a b.gguf", "a-int4")
    assert sorted(onnx.files) == ["config.json", "genai_config.json", "onnx/model_q4.onnx", "tokenizer.json"]


def test_links_inside_and_a_link_that_is_named_are_followed(tmp_path):
    out = fake_out(tmp_path / "out")
    link(out / "gguf-q4" / "again.gguf", out / "gguf-q4" / "a b.gguf")
    assert [artifact.name for artifact in find_artifacts(out)][:2] == ["a b.gguf", "again.gguf"]
    link(tmp_path / "named.gguf", out / "gguf-q4" / "a b.gguf")
    (artifact,) = find_artifacts(tmp_path / "named.gguf")
    assert not artifact.obstacle
