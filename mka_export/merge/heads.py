"""The attention heads of two layers become those of one: they compete, as the neurons do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mka_export.merge.fit_tokens import attention_names
from mka_export.merge.fuse import FLOAT, Fused
from mka_export.merge.ridge import Elimination, elimination_values
from mka_export.merge.trajectory import Trajectory
from mka_export.models.outline import Outline

READERS = ("q", "k", "v")  # the roles that read the stream


def heads_bytes(model: Outline) -> int:
    """Return the memory of ``compete_heads``: the equations of both layers' heads, their inverse, one change of it."""
    hidden, width = model.layer[model.architecture.layer["o"]]
    return FLOAT * elimination_values(2 * width, hidden)


def compete_heads(trajectory: Trajectory, position: int, last: int) -> tuple[Fused, dict[str, float]]:
    """Let the attention heads of two layers compete for the places of one, and refit ``o_proj``.

    Query heads that share a key head (grouped-query attention, arXiv 2305.13245) move with it. Both layers' heads read
    the merged model's stream, each through its own norm. A ridge regression of all that they bring to ``o_proj`` on
    what the *original* model has after the upper layer's attention gives each an output; then the group goes whose
    absence, the others being fitted anew, costs least (the block form of optimal brain surgery, Hassibi & Stork 1992),
    until as many are left as one layer holds. Every token counts relative to its own stream.

    Returns:
        norm, q, k, v and o with their biases: the merged layer's attention; and figures for the plan.
    """
    checkpoint = trajectory.runner.checkpoint
    roles = {**checkpoint.architecture.layer, **checkpoint.architecture.optional}
    names = attention_names(trajectory, position)
    layers = [trajectory.weights(place, *names) for place in (position, last)]
    lower = layers[0]
    groups = int(checkpoint.config.get("num_key_value_heads") or checkpoint.config["num_attention_heads"])
    prior = torch.cat([layer[roles["o"]] for layer in layers], dim=1)
    regression = Elimination(prior, 2 * groups)
    _add_tokens(regression, trajectory, position, last, layers, lower.get(roles.get("o_bias", "")))
    kept, fit = regression.keep(groups)
    fused = {}
    for role in (f"{role}{suffix}" for suffix in ("", "_bias") for role in READERS):
        name = roles.get(role, "")
        if name in lower:
            rows = torch.cat([_reading(layer, roles, role) for layer in layers])
            rows = rows.view(2 * groups, -1, *rows.shape[1:])
            fused[name] = rows[kept].flatten(0, 1)
    # Scale moves freely between the norm and the columns: even columns quantize best.
    matrices = [fused[roles[role]] for role in READERS]
    scale = torch.cat(matrices).square().mean(dim=0).sqrt().clamp_min(1e-6)
    for matrix in matrices:
        matrix.div_(scale)
    fused |= {roles["attention_norm"]: scale, roles["o"]: fit.weights}
    others = {name: tensor for name, tensor in lower.items() if name not in fused}  # a bias of o_proj
    figures = {"groups_from_upper": float((kept >= groups).float().mean()), "attention_unexplained": fit.unexplained}
    return {**others, **fused}, figures


def _add_tokens(
    regression: Elimination, trajectory: Trajectory, position: int, last: int, layers: list[Fused], bias: Tensor | None
) -> None:
    """Add all calibration tokens: what both layers' heads bring to ``o_proj``, and what should come out."""
    runner, norm = trajectory.runner, trajectory.runner.checkpoint.architecture.layer["mlp_norm"]
    kind, upper = trajectory.layers[position].first, trajectory.layers[last].last
    original = runner.weights(upper, *layers[0])
    ones = {norm: torch.ones(runner.checkpoint.hidden_size, device=runner.device)}  # of an MLP that is not run
    for batch in trajectory.batches():
        before = trajectory.before(position, batch)
        heads = [runner.before_mlp(kind, layer | ones, before)[2] for layer in layers]
        after, _, _ = runner.before_mlp(upper, original | ones, trajectory.original(upper, batch))
        weight = after.square().mean(dim=-1, keepdim=True).rsqrt()
        wanted = after - before if bias is None else after - before - bias
        regression.add((torch.cat(heads, dim=-1) * weight).flatten(0, 1), (wanted * weight).flatten(0, 1))


def _reading(layer: Fused, roles: Mapping[str, str], role: str) -> Tensor:
    """Return rows, or biases, of q, k or v; the norm's weight is multiplied into the rows."""
    tensor = layer[roles[role]]
    return tensor * layer[roles["attention_norm"]] if tensor.dim() == 2 else tensor
