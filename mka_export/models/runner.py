"""Run a model a layer at a time, so that it never has to fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeVar

import torch
import transformers
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from mka_export.errors import CheckpointError, MkaError
from mka_export.memory import return_freed_blocks
from mka_export.models.checkpoint import CONFIG, Checkpoint
from mka_export.models.device import as_memory_allows, pick_device
from mka_export.models.finite import require_finite
from mka_export.models.outline import Outline
from mka_export.models.statistics import InputStatistics
from mka_export.progress import Progress

Weights = Mapping[str, Tensor]  # name inside the layer -> tensor, as the layer computes with it
KeyValues = tuple[Tensor, Tensor]
Seen = TypeVar("Seen", bound=InputStatistics)

# Tokens that go through a layer together: enough to keep the cores busy, few enough that the widest
# intermediate of an 8B model (14 336 neurons, float32) stays near 100 MB.
BATCH_TOKENS = 2048

LARGE_LAYER = 1 << 22  # weights, from which on it costs little to keep nothing that is freed


class LayerRunner:
    """The decoder of a checkpoint, in float32, with each layer's weights brought in only while it runs.

    The model is built once without storage (on torch's meta device) and run once with its layers replaced
    by recorders; what each layer is given besides its input state (rotary embeddings, mask) is kept and
    replayed. So transformers' own layer code computes, whatever the family.

    Args:
        checkpoint: the model.
        device: ``cpu``, ``cuda``, ``cuda:1`` ... or ``auto``.
        name: what progress calls the model; the folder's name by default.

    Raises:
        CheckpointError: transformers cannot make a model of the config, or one whose tensors have other shapes.
        UsageError: the device is not there.
    """

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu", name: str | None = None) -> None:
        self.checkpoint = checkpoint
        self.name = name or checkpoint.path.name
        self.device = pick_device(device)
        weights = sum(math.prod(checkpoint.shapes[name]) for name in checkpoint.layer_names(0))
        # Before the model is built: what that frees would stay, hole by hole and layer by layer, to be filled later.
        return_freed_blocks(1 << 20 if weights >= LARGE_LAYER else 16 << 20)
        self._model = _empty_model(checkpoint)
        architecture = checkpoint.architecture
        self._layers = self._model.get_submodule(architecture.layers)
        self._parent, _, self._layers_name = architecture.layers.rpartition(".")
        taken = signature(type(self._model.get_submodule(self._parent)).forward).parameters
        self._cache_keyword = "cache" if "cache" in taken else "past_key_values"  # its name before transformers 5.24
        self._norm = self._model.get_submodule(architecture.tensors["norm"].rpartition(".")[0])
        self._keywords: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def layer_module(self, index: int) -> nn.Module:
        """Return layer ``index``, without storage: for its submodules' paths and attributes."""
        layer: nn.Module = self._layers.get_submodule(str(index))
        return layer

    def weights(self, index: int, *names: str) -> dict[str, Tensor]:
        """Read weights of layer ``index`` into float32 on the device: those called ``names``, or all.

        Raises:
            CheckpointError: one is damaged, or holds NaN or infinity.
        """
        stored = self.checkpoint.layer(index, *names)
        for name, tensor in stored.items():
            require_finite(self.checkpoint.architecture.layer_name(index, name), tensor)
        return {name: tensor.to(self.device, torch.float32) for name, tensor in stored.items()}

    def embed(self, ids: Tensor) -> Tensor:
        """Return the states before the first layer: ids (N, T) -> (N, T, hidden) float32.

        Only the rows that occur are read.
        """
        unique, inverse = torch.unique(ids, return_inverse=True)
        name = self.checkpoint.architecture.tensors["embedding"]
        rows = self.checkpoint.rows(name, unique)
        require_finite(name, rows)
        return rows.to(self.device, torch.float32)[inverse.to(self.device)]

    def run_layer(self, index: int, weights: Weights, states: Tensor, statistics: Seen | None = None) -> Tensor:
        """Apply the layer of kind ``index`` with ``weights``: (batch, T, hidden) -> the same shape.

        ``index`` chooses what the layer is given (mask, rotary embeddings); the weights may be any.

        Args:
            statistics: told the inputs of the layer's linear modules.

        Raises:
            MkaError: not even one window fits in memory.
        """

        def work(states: Tensor) -> tuple[Tensor]:
            if statistics is None:
                return (self._run_layer(index, weights, states),)
            seen = statistics.empty()  # of this attempt, which may end half-way
            with self._watched(index, seen):
                after = self._run_layer(index, weights, states)
            statistics.include(seen)
            return (after,)

        (after,) = as_memory_allows(work, states)
        return after

    def before_mlp(self, index: int, weights: Weights, states: Tensor) -> tuple[Tensor, Tensor]:
        """Apply all of layer ``index`` but its MLP, whose weights need not be there.

        Returns:
            the stream that the MLP would add to, and what the MLP would read: both of ``states``' shape.
        """
        layer, name = self.layer_module(index), self.checkpoint.architecture.mlp
        mlp, silent = layer.get_submodule(name), _SilentMLP()

        def work(states: Tensor) -> tuple[Tensor, Tensor]:
            return self._run_layer(index, weights, states), silent.inputs

        try:
            setattr(layer, name, silent)
            stream, inputs = as_memory_allows(work, states)
            return stream, inputs
        finally:
            setattr(layer, name, mlp)

    def run_prefix(self, index: int, weights: Weights, states: Tensor) -> tuple[Tensor, KeyValues]:
        """Apply layer ``index`` to the states (1, P, hidden) of what several texts begin with.

        Returns:
            the states after it, and the layer's keys and values, each (1, heads, P, width), for ``run_rests``.
        """
        cache: Any = DynamicCache()
        after = self._run_layer(index, weights, states, cache)
        return after, (cache.layers[index].keys, cache.layers[index].values)

    def run_rests(self, index: int, weights: Weights, states: Tensor, prefix: KeyValues) -> Tensor:
        """Apply layer ``index`` to the states (batch, T, hidden) of texts behind a prefix that ``run_prefix`` has seen."""
        keys, values = (part.expand(len(states), -1, -1, -1) for part in prefix)
        cache = DynamicCache()
        cache.update(keys, values, index)
        return self._run_layer(index, weights, states, cache)

    @torch.no_grad()
    def _run_layer(self, index: int, weights: Weights, states: Tensor, cache: DynamicCache | None = None) -> Tensor:
        past = cache.get_seq_length(index) if cache else 0
        keywords = self._recorded(states.shape[1], past)[index]
        if cache is not None:
            keywords = {**keywords, self._cache_keyword: cache}
        out = functional_call(self.layer_module(index), dict(weights), (states,), keywords)
        after: Tensor = out[0] if isinstance(out, tuple) else out
        return after

    @contextmanager
    def _watched(self, index: int, statistics: InputStatistics) -> Iterator[None]:
        """Tell ``statistics`` the input of every linear layer inside layer ``index`` while the block runs."""

        def attach(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def call(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                statistics.add(path, inputs[0])

            return call

        handles = [
            part.register_forward_pre_hook(attach(path))
            for path, part in self.layer_module(index).named_modules()
            if isinstance(part, nn.Linear)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def batches(self, windows: int, tokens: int) -> Iterator[slice]:
        """Cut ``windows`` windows of ``tokens`` tokens into batches of about ``BATCH_TOKENS``."""
        step = max(1, BATCH_TOKENS // tokens)
        for start in range(0, windows, step):
            yield slice(start, min(start + step, windows))

    def hidden_states(self, ids: Tensor, progress: Progress | None = None) -> Tensor:
        """Run all layers: ids (N, T) -> states after the last layer, before the final norm (N, T, hidden)."""
        states = self.embed(ids)
        progress = progress or Progress(quiet=True)
        with progress.task(f"{self.name}, layer by layer", self.checkpoint.num_layers) as task:
            for index in range(self.checkpoint.num_layers):
                weights = self.weights(index)
                for batch in self.batches(*ids.shape):
                    states[batch] = self.run_layer(index, weights, states[batch])
                task.advance()
        return states

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Apply final norm and head: (..., hidden) -> (..., vocabulary) float32."""
        norm_name = self.checkpoint.architecture.tensors["norm"]
        norm = {"weight": self.checkpoint.tensor(norm_name).to(self.device, torch.float32)}
        normed = functional_call(self._norm, norm, (states.to(self.device),))
        head = self.checkpoint.tensor(self.checkpoint.head)
        out = torch.empty((*states.shape[:-1], head.shape[0]), dtype=torch.float32, device=self.device)
        step = max(1, (64 << 20) // (4 * head.shape[1]))  # 64 MB of the head in float32 at a time
        for start in range(0, head.shape[0], step):
            rows = head[start : start + step].to(self.device, torch.float32)
            out[..., start : start + step] = normed @ rows.T
        return out

    def _recorded(self, tokens: int, past: int = 0) -> list[dict[str, Any]]:
        """Return what the model gives each of its layers, for windows of ``tokens`` tokens behind ``past`` others."""
        if (tokens, past) not in self._keywords:
            parent = self._model.get_submodule(self._parent)
            recorders = [_Recorder() for _ in range(self.checkpoint.num_layers)]
            name, norm_name = self._layers_name, self.checkpoint.architecture.tensors["norm"].split(".")[-2]
            try:
                setattr(parent, name, nn.ModuleList(recorders))
                setattr(parent, norm_name, nn.Identity())
                states = torch.zeros(1, tokens, self.checkpoint.hidden_size, device=self.device)
                seen = DynamicCache()  # only its length counts
                for index in range(self.checkpoint.num_layers if past else 0):
                    length = torch.empty(1, 1, past, 1, device=self.device)
                    seen.update(length, length, index)
                cache = {self._cache_keyword: seen} if past else {}
                with torch.no_grad():
                    parent(inputs_embeds=states, use_cache=bool(past), **cache)
            finally:
                setattr(parent, name, self._layers)
                setattr(parent, norm_name, self._norm)
            self._keywords = {(tokens, past): [recorder.keywords for recorder in recorders]}  # one shape at a time
        return self._keywords[tokens, past]


def _empty_model(checkpoint: Checkpoint) -> nn.Module:
    """Build the model without storage for its weights.

    Raises:
        CheckpointError: the config cannot be built, or not with the checkpoint's tensors.
    """
    path = checkpoint.path / CONFIG
    remedy = "Use the config that belongs to the weights."
    name = checkpoint.config["architectures"][0]
    kind = getattr(transformers, name).config_class.model_type
    if (named := checkpoint.config.get("model_type")) != kind:  # which transformers goes by
        raise CheckpointError(f"{path}: model_type = {named!r} is not {kind!r}, as {name} asks for", remedy)
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        config._attn_implementation = "sdpa"
        config.use_cache = False
        config.dtype = torch.float32
        # First without storage for buffers too: they may be of any size until the shapes are known to be those of files.
        with torch.device("meta"):
            _check_shapes(checkpoint, AutoModelForCausalLM.from_config(config, trust_remote_code=False))  # type: ignore[no-untyped-call]
        with init_empty_weights(include_buffers=False):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)  # type: ignore[no-untyped-call]
            return model.eval().float()
    except MkaError:
        raise
    except Exception as error:  # transformers and torch raise whatever they stumble over
        raise CheckpointError(f"transformers cannot build the model of {path}: {error}", remedy) from error


def _check_shapes(checkpoint: Checkpoint, model: nn.Module) -> None:
    for name, expected in model.state_dict().items():
        if name in checkpoint.shards and (shape := checkpoint.shapes[name]) != tuple(expected.shape):
            raise CheckpointError(
                f"tensor {name} in {checkpoint.path} is {list(shape)}, by {CONFIG} it should be {list(expected.shape)}",
                "Use the config that belongs to the weights.",
            )


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps the keyword arguments, passes the state through."""

    keywords: dict[str, Any]

    def forward(self, states: Tensor, **keywords: Any) -> Tensor:
        self.keywords = keywords
        return states


class _SilentMLP(nn.Module):
    """Stands in for an MLP: keeps its input, adds nothing."""

    inputs: Tensor

    def forward(self, states: Tensor) -> Tensor:
        self.inputs = states
        return torch.zeros_like(states)


def layer_pass_bytes(model: Outline) -> int:
    """Return the memory that running any layer over a batch of ``BATCH_TOKENS`` takes at most."""
    weights = sum(map(math.prod, model.layer.values()))
    neurons = model.layer[model.architecture.layer["gate"]][0]
    return weights * (4 + model.itemsize) + 4 * BATCH_TOKENS * (4 * neurons + 12 * model.hidden_size)
