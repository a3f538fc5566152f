"""The tensors of a model, by name and shape: what can be said of it before it is there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers

from mka_export.errors import CheckpointError
from mka_export.models.architecture import Architecture, architecture_of, architectures
from mka_export.models.catalog import Entry
from mka_export.models.checkpoint import Checkpoint

ITEMSIZES = {"float16": 2, "bfloat16": 2}  # of the types that a config names; else 4
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Outline:
    """A model's family, size and shapes, without its weights.

    Attributes:
        architecture: the model's family.
        config: the contents of ``config.json``.
        shapes: tensor name -> shape; a head tied to the embedding is left out.
        itemsize: bytes of a weight.
    """

    architecture: Architecture
    config: Mapping[str, Any]
    shapes: Shapes
    itemsize: int

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Outline:
        """Return the model that a ``config.json`` describes.

        Raises:
            UnsupportedError: it is of an unknown family.
            CheckpointError: it describes no model.
        """
        architecture = architecture_of(config)
        try:
            made = getattr(transformers, config["architectures"][0]).config_class.from_dict(dict(config))
        except Exception as error:  # transformers raises whatever its validators raise
            raise CheckpointError(f"the config describes no {architecture.name} model: {error}") from error
        itemsize = ITEMSIZES.get(str(config.get("dtype") or config.get("torch_dtype")), 4)
        return cls(architecture, config, shapes_of(made), itemsize)

    @classmethod
    def of_entry(cls, entry: Entry) -> Outline:
        """Return the model of a short name."""
        architecture = architectures()[entry.family]
        layers = dict.fromkeys(architecture.config["layer_count"], entry.layers)
        return cls.of_config(
            {"architectures": [architecture.classes[0]], "dtype": "bfloat16", **entry.config, **layers}
        )

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Outline:
        """Return the model in a checkpoint."""
        head = checkpoint.architecture.tensors["head"]
        names = [name for name in checkpoint.shards if name != head or checkpoint.head == head]
        shapes = {name: checkpoint.shapes[name] for name in names}
        return cls(checkpoint.architecture, checkpoint.config, shapes, checkpoint.dtype.itemsize)

    @property
    def num_layers(self) -> int:
        """The number of decoder layers."""
        return self.architecture.layer_count(self.config)

    @property
    def hidden_size(self) -> int:
        """The width of the residual stream."""
        return self.shapes[self.architecture.tensors["embedding"]][1]

    @property
    def vocab_size(self) -> int:
        """The number of embedding rows."""
        return self.shapes[self.architecture.tensors["embedding"]][0]

    @property
    def parameters(self) -> int:
        """The number of weights."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def nbytes(self) -> int:
        """The size of the weights in bytes."""
        return self.parameters * self.itemsize

    @property
    def layer(self) -> Shapes:
        """Name inside the first layer -> shape."""
        inside = {self.architecture.split(name): shape for name, shape in self.shapes.items()}
        return {name: shape for (index, name), shape in inside.items() if index == 0}

    @property
    def cache_values(self) -> int:
        """How many numbers the key-value cache of all layers holds for each token."""
        parts = ((self.architecture.split(name), shape) for name, shape in self.shapes.items())
        return sum(
            shape[0]
            for (index, inside), shape in parts
            if index is not None and self.architecture.roles[inside] in ("k", "v")
        )

    def with_layers(self, count: int) -> Outline:
        """Return the same model with only the first ``count`` layers."""
        kept = {n: s for n, s in self.shapes.items() if (self.architecture.split(n)[0] or 0) < count}
        return replace(self, config=self.architecture.config_for_layers(self.config, range(count)), shapes=kept)


def shapes_of(config: transformers.PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model that a config describes: name -> shape, tied ones once.

    Raises:
        CheckpointError: it describes none that can be built.
    """
    assert config.architectures
    try:
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
    except Exception as error:  # transformers and torch raise whatever they stumble over
        raise CheckpointError(f"the config describes a model that cannot be built: {error}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in model.all_tied_weights_keys:
        del shapes[name]
    return shapes
