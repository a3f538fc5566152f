from __future__ import annotations

import re
from math import prod

import pytest

from mka_export.models.architecture import architectures
from mka_export.models.catalog import catalog
from mka_export.models.outline import Outline
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


@pytest.mark.parametrize("alias", catalog())
def test_parameters_follow_from_the_config(alias: str) -> None:
    entry = catalog()[alias]
    model = Outline.of_entry(entry)
    assert (model.architecture.name, model.num_layers, model.parameters) == (
        entry.family,
        entry.layers,
        entry.parameters,
    )
    assert model.nbytes == 2 * entry.parameters
    assert model.with_layers(3).num_layers == 3
    assert model.parameters - model.with_layers(entry.layers - 1).parameters == sum(map(prod, model.layer.values()))
