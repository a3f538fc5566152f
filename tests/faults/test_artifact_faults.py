"""Artifacts"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fault_tools import DONE, LOOSE, MERGE, SMALL, contents, type_in

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


def test_survived_hostile_chat_template(model, tmp_path):
    """the chat template tries to run code: it is carried into the artifact as text, and never rendered"""
    witness = tmp_path / "witness"
    hostile = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.system('touch %s') }}"
    for name, key in (("chat_template.jinja", None), ("tokenizer_config.json", "chat_template")):
        path, text = model / name, hostile % witness
        if key:
            text = json.dumps({**json.loads(path.read_text()), key: text})
        path.write_text(text)
    out = tmp_path / "out"
    assert type_in(model, *MERGE, "--to", "gguf-q8", *SMALL, *LOOSE, "--out", out, "--quiet").exit_code in DONE
    (gguf,) = (out / "gguf-q8").glob("*.gguf")
    assert b"__subclasses__" in gguf.read_bytes()
    assert not witness.exists()


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
