from __future__ import annotations

import json
import shutil

import pytest

from mka_export.errors import RuntimeFailure
from mka_export.parity.harness.frame import Frame


def test_a_checkpoint_and_its_gguf_have_the_same_frame(pico_llama, pico_gguf):
    assert Frame.of(pico_llama) == Frame.of(pico_gguf) == Frame(None, 1, 512)


def test_bos_is_found_where_the_tokenizer_puts_one(pico_llama, tmp_path):
    folder = shutil.copytree(pico_llama, tmp_path / "pico")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert Frame.of(folder).leading == 1


def test_eos_takes_the_place_of_bos_and_without_either_a_model_is_refused(pico_llama, tmp_path):
    folder = shutil.copytree(pico_llama, tmp_path / "pico")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None}))
    assert Frame.of(folder).prefix == 2
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": None, "eos_token": None}))
    with pytest.raises(RuntimeFailure, match="neither BOS nor EOS"):
        Frame.of(folder)


def test_damaged_settings_are_a_failure_of_the_artifact(tmp_path):
    (tmp_path / "genai_config.json").write_text('{"model": {"context_length": "long"}}')
    with pytest.raises(RuntimeFailure):
        Frame.of(tmp_path)
