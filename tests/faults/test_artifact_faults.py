"""Artifacts"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from command import type_in
from fault_tools import DONE, LOOSE, MERGE, SMALL, contents
from onnx import TensorProto, helper, save

FALLBACK = [*MERGE, "--to", "gguf-q4", *SMALL, *LOOSE]


def test_survived_fallback(model, tmp_path):
    """rows do not divide into the quantizer's blocks: another type, counted and shown"""
    result = type_in(model, *FALLBACK, "--out", tmp_path / "out", "--json")
    assert result.exit_code in DONE
    details = json.loads(result.stdout)["targets"][0]["artifact"]["details"]
    assert details["fallback_types"] == {"Q5_0": 31, "Q8_0": 5}
    assert details["fallback_share"] == 1.0
    assert "fell back to other types" in details["warnings"][0]


def test_refused_fallback(model, tmp_path):
    """more weights fall back than --max-fallback allows: that target fails, the others go on"""
    out = tmp_path / "out"
    result = type_in(model, *FALLBACK, "--to", "gguf-f16", "--max-fallback", "0.5", "--out", out, "--json", "--quiet")
    assert result.exit_code == 1
    q4, f16 = json.loads(result.stdout)["targets"]
    assert (q4["verdict"], q4["artifact"]) == ("fail", None)
    assert "100% of the weights fell back" in q4["error"]
    assert f16["verdict"] in ("pass", "inconclusive")
    assert not (out / "gguf-q4").exists()


@pytest.mark.parametrize("command", ["merge and convert", "convert"])
def test_refused_unknown_pretokenizer(command, model, refused):
    """the BPE pre-tokenizer is one that llama.cpp does not know: found before the merge"""
    path = model / "tokenizer.json"
    data = json.loads(path.read_text())
    data["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "[aeiou]+"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps(data))
    run = [model, *MERGE] if command != "convert" else ["convert", model]
    refused([*run, "--to", "gguf-q8", *SMALL, "--out", "{out}", "--quiet"], "unknown pre-tokenizer")


def test_refused_unknown_precision(model, refused, tmp_path):
    """a target's file asks for a number format that the converter does not have: found before the merge"""
    target = tmp_path / "mine.toml"
    target.write_text('description = "mine"\nconverter = "gguf"\nprecision = "q4_k_x"\nruntime = "llama.cpp"\n')
    refused(
        [model, *MERGE, "--to", target, *SMALL, "--out", "{out}", "--quiet"], "unknown precision 'q4_k_x'", "q4_k_m"
    )


def test_refused_larger_than_the_device(model, refused, tmp_path):
    """the artifact and its key-value cache are larger than what the target's devices have: found before the merge"""
    target = tmp_path / "watch.toml"
    target.write_text(
        'description = "a watch"\nconverter = "gguf"\nprecision = "f16"\nruntime = "llama.cpp"\n'
        '[budget]\nmemory = "2 MB"\ncontext = 2048\n'
    )
    refused(
        [model, *MERGE, "--to", target, *SMALL, "--out", "{out}", "--quiet"],
        "target watch is for devices with 2.0 MB for a model",
        "for 2,048 tokens of context",
        "choose another --to",
    )


def test_survived_hostile_chat_template(model, tmp_path):
    """the chat template tries to run code: it is carried into the artifact as text, and the sandbox stops it"""
    witness = tmp_path / "witness"
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch %s') }}"
    for name, key in (("chat_template.jinja", None), ("tokenizer_config.json", "chat_template")):
        path, text = model / name, hostile % witness
        if key:
            text = json.dumps({**json.loads(path.read_text()), key: text})
        path.write_text(text)
    out = tmp_path / "out"
    result = type_in(model, *MERGE, "--to", "gguf-q8", *SMALL, *LOOSE, "--out", out, "--quiet", "--json")
    assert result.exit_code in DONE
    (gguf,) = (out / "gguf-q8").glob("*.gguf")
    assert b"__subclasses__" in gguf.read_bytes()
    assert not witness.exists()
    (target,) = json.loads(result.stdout)["targets"]
    chat_template = target["smoke"]["checks"][0]
    assert chat_template["verdict"] == "inconclusive"
    assert "SecurityError" in chat_template["reason"]


def edited(published: Path, new: Path, change: Callable[[bytes], bytes]) -> Path:
    """Copy the GGUF file of an earlier result, and edit its bytes."""
    (gguf,) = (published / "gguf-q8").glob("*.gguf")
    data = gguf.read_bytes()
    new.write_bytes(change(data))
    assert new.read_bytes() != data
    return new


BEHAVES_OTHERWISE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "another chat template": (
        lambda data: data.replace(b"<|im_start|>assistant\n", b"<|im_start|>assistent\n"),
        "reads a conversation otherwise than the original: its chat template makes",
    ),
    "a chat template that runs code": (
        lambda data: data.replace(b"{{ message['content'] }}", b"{{ message.__init__(1)}}"),
        "its chat template cannot render it (SecurityError: ",
    ),
    "an end of text in the middle of text": (
        lambda data: data.replace(EOS + struct.pack("<II", 4, 2), EOS + struct.pack("<II", 4, 267)),
        "The artifact stops at 267 (",
    ),
}
EOS = b"tokenizer.ggml.eos_token_id"


@pytest.mark.parametrize("how", BEHAVES_OTHERWISE)
def test_survived_artifact_that_behaves_otherwise(how, model, published, tmp_path):
    """a file computes what it should, and its chat template or its end of text is another: it fails, in a sentence"""
    change, reason = BEHAVES_OTHERWISE[how]
    bad = edited(published, tmp_path / "bad.gguf", change)
    out = tmp_path / "out"
    result = type_in("check", bad, "--against", model, *SMALL, *LOOSE, "--out", out, "--json", "--quiet")
    assert result.exit_code == 3
    (target,) = json.loads(result.stdout)["targets"]
    assert reason in target["error"]
    assert "\n" not in target["error"]
    assert target["smoke"]["verdict"] == "fail"
    assert all(group["verdict"] != "fail" for group in target["comparisons"].values())


def onnx_folder(folder: Path, data: str) -> Path:
    """Write a graph that says its weights are in the file ``data``."""
    weights = TensorProto(name="w", dims=[4], data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    weights.external_data.add(key="location", value=data)
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "g", [], [result], [weights])
    (folder / "onnx").mkdir(parents=True)
    save(helper.make_model(graph), folder / "onnx" / "model.onnx")
    config = {"model": {"vocab_size": 640, "decoder": {"filename": "onnx/model.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return folder


ELSEWHERE: dict[str, tuple[str, Callable[[Path, Path], object]]] = {
    "by a path": ("../../secret", lambda secret, data: None),
    "by an absolute path": ("/etc/hostname", lambda secret, data: None),
    "by a symbolic link": ("model.onnx_data", lambda secret, data: data.symlink_to(secret)),
    "by a hard link": ("model.onnx_data", os.link),
    "nowhere": ("model.onnx_data", lambda secret, data: None),
}


@pytest.mark.parametrize("how", ELSEWHERE)
def test_refused_onnx_data_elsewhere(how, model, tmp_path):
    """an ONNX graph has its weights outside of its folder"""
    secret, (location, place) = tmp_path / "secret", ELSEWHERE[how]
    secret.write_bytes(bytes(16))
    folder = onnx_folder(tmp_path / "foreign", location)
    place(secret, folder / "onnx" / location)
    result = type_in("check", folder, "--against", model, "--out", tmp_path / "check", *SMALL, "--json", "--quiet")
    assert result.exit_code == 3
    (target,) = json.loads(result.stdout)["targets"]
    assert f"has its weights in '{location}', which is no file of its own beside it" in target["error"]


def test_refused_onnx_graph_elsewhere(model, tmp_path):
    """the folder of an ONNX model names a graph outside of it"""
    folder = onnx_folder(tmp_path / "foreign", "w")
    shutil.move(folder / "onnx" / "model.onnx", tmp_path / "model.onnx")
    config = folder / "genai_config.json"
    config.write_text(config.read_text().replace("onnx/model.onnx", "../model.onnx"))
    result = type_in("check", folder, "--against", model, "--out", tmp_path / "check", *SMALL, "--json", "--quiet")
    assert result.exit_code == 3
    (target,) = json.loads(result.stdout)["targets"]
    assert "names a graph outside of its folder: ../model.onnx" in target["error"]


def test_survived_edited_artifact(published, tmp_path):
    """an artifact was edited after it was checked: verify finds it"""
    out = Path(shutil.copytree(published, tmp_path / "out"))
    (gguf,) = (out / "gguf-q8").glob("*.gguf")
    gguf.write_bytes(gguf.read_bytes()[:-1] + b"!")
    result = type_in("verify", out, "--quiet")
    assert result.exit_code == 1
    assert f"changed  gguf-q8/{gguf.name}" in result.stdout
    before = contents(out)
    assert type_in("verify", out, "--json", "--quiet").exit_code == 1
    assert contents(out) == before
