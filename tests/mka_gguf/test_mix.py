"""Bits a weight of a file that is not made, against those of one that is."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from mka_gguf.mix import bits_per_weight
from pico import make_pico

from mka_export.models.activations import Activations
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.outline import Outline
from mka_export.target import Limits, Target


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Rows that fit the blocks of all types, and layers enough for a mix."""
    return make_pico(
        tmp_path_factory.mktemp("wide") / "wide", "qwen2", hidden_size=256, intermediate_size=512, num_hidden_layers=16
    )


@pytest.mark.parametrize("precision", ["f16", "q4_0", "q4_k_m", "q3_k_m"])
def test_what_is_said_is_what_is_made(precision, pico_llama, wide, convert_to):
    for model in (pico_llama, wide):
        target = Target("t", "", "gguf", precision, "llama.cpp", Limits(), Limits())
        said = bits_per_weight(Outline.of_checkpoint(Checkpoint.open(model)), target)
        assert said == pytest.approx(convert_to(model, precision).details["bits_per_weight"], rel=1e-12)


def test_an_imatrix_changes_a_mix_as_it_changes_the_file(wide, convert_to):
    checkpoint = Checkpoint.open(wide)
    ones = {
        name: torch.ones(shape[1])
        for name, shape in checkpoint.shapes.items()
        if len(shape) > 1 and "embed" not in name
    }
    made = convert_to(wide, "iq4_xs", Activations(ones, 1, "0" * 64))
    target = Target("t", "", "gguf", "iq4_xs", "llama.cpp", Limits(), Limits(), activations=True)
    model = Outline.of_checkpoint(checkpoint)
    assert made.details["bits_per_weight"] == bits_per_weight(model, target)
    assert made.details["bits_per_weight"] < bits_per_weight(model, dataclasses.replace(target, activations=False))


def test_the_mix_of_fewer_layers_is_another(wide):
    model = Outline.of_checkpoint(Checkpoint.open(wide))
    target = Target("t", "", "gguf", "q4_k_m", "llama.cpp", Limits(), Limits())
    inside = [bits_per_weight(model.with_layers(layers), target) for layers in (16, 8)]
    assert inside[0] < inside[1]
