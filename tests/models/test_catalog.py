from __future__ import annotations

import re

from mka_export.models.architecture import architectures
from mka_export.models.catalog import catalog
from mka_export.models.sources import HUB_ID


def test_the_names_the_paper_and_the_readme_use_are_there() -> None:
    wanted = "llama3-8b llama3.1-8b llama2-7b llama2-13b llama3.2-1b llama3.2-3b mistral-7b qwen2.5-0.5b smollm2-135m"
    assert set(wanted.split()) <= set(catalog())


def test_every_entry_has_one_origin_and_a_known_family() -> None:
    for alias, entry in catalog().items():
        assert bool(entry.hub) != bool(entry.wheel), alias
        assert entry.origin == entry.hub or "==" in entry.origin, alias
        assert not entry.hub or HUB_ID.fullmatch(entry.hub), alias
        assert entry.family in architectures(), alias
        assert entry.layers > 0, alias
        assert entry.parameters > 1e8, alias
        assert entry.licence, alias


def test_the_embedded_model_is_pinned() -> None:
    entry = catalog()["smollm2-135m"]
    assert entry.member.endswith(".gguf")
    assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert not entry.gated


# hidden, layers, intermediate, key-value width, vocabulary, tied, biases: from the models' config.json
SHAPES = {
    "smollm2-135m": (576, 30, 1536, 192, 49152, True, False),
    "smollm2-360m": (960, 32, 2560, 320, 49152, True, False),
    "smollm2-1.7b": (2048, 24, 8192, 2048, 49152, True, False),
    "llama2-7b": (4096, 32, 11008, 4096, 32000, False, False),
    "llama2-13b": (5120, 40, 13824, 5120, 32000, False, False),
    "llama3-8b": (4096, 32, 14336, 1024, 128256, False, False),
    "llama3.1-8b": (4096, 32, 14336, 1024, 128256, False, False),
    "llama3.2-1b": (2048, 16, 8192, 512, 128256, True, False),
    "llama3.2-3b": (3072, 28, 8192, 1024, 128256, True, False),
    "mistral-7b": (4096, 32, 14336, 1024, 32000, False, False),
    "qwen2.5-0.5b": (896, 24, 4864, 128, 151936, True, True),
    "qwen2.5-1.5b": (1536, 28, 8960, 256, 151936, True, True),
    "qwen2.5-3b": (2048, 36, 11008, 256, 151936, True, True),
    "qwen2.5-7b": (3584, 28, 18944, 512, 152064, False, True),
    "qwen2.5-coder-0.5b": (896, 24, 4864, 128, 151936, True, True),
}


def test_parameters_follow_from_the_shapes() -> None:
    assert set(SHAPES) == set(catalog())
    for alias, (hidden, layers, inner, kv, vocab, tied, biases) in SHAPES.items():
        layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner + 2 * hidden
        layer += hidden + 2 * kv if biases else 0
        total = layers * layer + hidden + vocab * hidden * (1 if tied else 2)
        assert (catalog()[alias].layers, catalog()[alias].parameters) == (layers, total), alias
