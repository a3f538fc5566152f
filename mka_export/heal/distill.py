"""Distillation: a shallower model learns to say what the original says."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from mka_export.errors import MkaError
from mka_export.heal.teacher import Teacher, unit
from mka_export.models.checkpoint import Checkpoint
from mka_export.models.checkpoint_writer import save_tensors
from mka_export.models.outline import Outline
from mka_export.models.whole import load_whole
from mka_export.progress import Progress
from mka_export.publish import publish_file, seal, sealed

HELD_OUT = 20  # one window in so many is not trained on: these say when to stop
WARM_UP = 0.1  # of the steps
CLIP = 1.0  # norm of the gradient
BETAS, EPSILON = (0.9, 0.95), 1e-8
HIDDEN = 1.0  # weight of the hidden-state term
SEED = 2406_16330
FLOOR = 1e-7  # of the probability of all tokens that are not among the teacher's
MOMENTS = ("exp_avg", "exp_avg_sq")
CHECKPOINTED = 2_000_000_000  # bytes of inner values above which they are made again in the backward pass


@dataclass(frozen=True)
class Healing:
    """How a model is trained.

    Attributes:
        steps: updates of the weights.
        batch: windows in each.
        rate: AdamW's learning rate at its highest, after warming up; it then falls to 0 as a cosine.
        train: ``all`` parameters, or those of ``merged`` layers.
        every: steps between looks at the held-out windows, after each of which work goes on if it is killed.
        patience: looks without a better one, after which it ends.
    """

    steps: int
    batch: int
    rate: float
    train: str
    every: int = 20
    patience: int = 3


@dataclass(frozen=True)
class Healed:
    """What came of it.

    Attributes:
        weights: file with the best weights, float32, by the checkpoint's names.
        losses: of each step on its batch: KL and hidden-state term together.
        held_out: step -> KL on the held-out windows, in nats; that of the merged model at 0.
        best: the step of the lowest.
    """

    weights: Path
    losses: list[float]
    held_out: dict[int, float]
    best: int


def distill(
    checkpoint: Checkpoint,
    ids: Tensor,
    teacher: Teacher,
    healing: Healing,
    merged: Sequence[int],
    device: torch.device,
    pieces: Path,
    progress: Progress,
) -> Healed:
    """Train a checkpoint on what the original says (arXiv 1503.02531), and on its last hidden state (arXiv 2407.14679).

    The loss is KL(original ‖ checkpoint) in nats, over the original's most likely tokens and all others as one, and
    ``HIDDEN`` times the mean square of the difference of the last layers' outputs, each scaled to a mean square of 1.
    AdamW without weight decay; bfloat16 autocast on CUDA, float32 on the CPU.

    Args:
        ids: windows (N, T), of which some are held out.
        teacher: the original's answers for them.
        merged: numbers of the layers that stand for several.
        pieces: where weights, moments and losses are kept, and taken from if an earlier run was killed.

    Raises:
        MkaError: the loss is no finite number, or the windows are too few.
    """
    training = _Training(checkpoint, ids, teacher, healing, merged, device, pieces)
    with progress.task(f"distilling, at most {healing.steps} steps", healing.steps) as task:
        task.advance(training.done)
        while not training.ended:
            training.step()
            task.advance()
            if training.done % healing.every == 0 or training.done == healing.steps:
                training.look()
                progress.say(f"  step {training.done}: KL on held-out text {training.held_out[training.done]:.4f} nats")
    return Healed(training.best_weights, training.losses, training.held_out, training.best)


class _Training:
    """The model in training; every look at the held-out windows leaves all of it on disk."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        ids: Tensor,
        teacher: Teacher,
        healing: Healing,
        merged: Sequence[int],
        device: torch.device,
        pieces: Path,
    ) -> None:
        self._ids, self._teacher, self._healing, self._pieces, self._device = ids, teacher, healing, pieces, device
        if len(ids) < HELD_OUT:
            raise MkaError(
                f"distilling needs at least {HELD_OUT} windows of {ids.shape[1]} tokens, the text has {len(ids)}",
                "Give a longer --calibration text, or raise --heal-tokens.",
            )
        self._held = range(HELD_OUT // 2, len(ids), HELD_OUT)
        self._trained = [i for i in range(len(ids)) if i not in self._held]
        self.losses: list[float] = []
        self.held_out: dict[int, float] = {}
        self.best = 0
        self._model = load_whole(checkpoint.path, device)
        self._model.train()
        norm = self._model.get_submodule(checkpoint.architecture.tensors["norm"].rpartition(".")[0])
        norm.register_forward_pre_hook(self._note_stream)
        tensors = dict(self._model.named_parameters())
        self._weights = {name: tensors[name] for name in checkpoint.shards}
        for name, tensor in self._weights.items():
            layer = checkpoint.architecture.split(name)[0]
            tensor.requires_grad_(healing.train == "all" or layer in merged)
        self._trainable = {name: tensor for name, tensor in self._weights.items() if tensor.requires_grad}
        if activation_bytes(Outline.of_checkpoint(checkpoint), ids.shape[1]) > CHECKPOINTED:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # it has another name from transformers 6 on
                self._model.gradient_checkpointing_enable({"use_reentrant": False})
        self._optimizer = torch.optim.AdamW(
            self._trainable.values(), lr=0.0, betas=BETAS, eps=EPSILON, weight_decay=0.0
        )
        self._resume()
        if not self.held_out:
            self.look()

    @property
    def done(self) -> int:
        """Steps so far."""
        return len(self.losses)

    @property
    def ended(self) -> bool:
        """All steps are done, or the held-out text has not become easier for a while."""
        since = [step for step in self.held_out if step > self.best]
        return self.done >= self._healing.steps or len(since) >= self._healing.patience

    @property
    def best_weights(self) -> Path:
        """The file of the weights that were best so far."""
        return self._pieces / f"best-{self.best}.safetensors"

    def step(self) -> None:
        """Do one update of the weights.

        Raises:
            MkaError: the loss is no finite number.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        self._optimizer.zero_grad(set_to_none=True)
        chosen, total = self._batch(), 0.0
        for window in chosen:  # one at a time: the logits of one are large enough
            divergence, distance = self._loss(window)
            loss = (divergence + HIDDEN * distance) / len(chosen)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
            total += float(loss.detach())
        self._finite(total, f"at step {self.done + 1}")
        nn.utils.clip_grad_norm_(self._trainable.values(), CLIP)
        self._optimizer.step()
        self.losses.append(total)

    def look(self) -> None:
        """Measure the held-out windows, and leave everything on disk."""
        with torch.no_grad():
            found = [float(self._loss(window)[0]) for window in self._held]
        self.held_out[self.done] = self._finite(sum(found) / len(found), "on held-out text")
        if self.held_out[self.done] <= self.held_out[self.best]:
            self.best = self.done
            self._publish(self.best_weights, {name: tensor.detach() for name, tensor in self._weights.items()}, {})
        moments = {}
        for name, tensor in self._trainable.items():
            moments[f"weight.{name}"] = tensor.detach()
            for key in MOMENTS:
                moments[f"{key}.{name}"] = self._optimizer.state[tensor].get(key, torch.zeros_like(tensor))
        looks = [[step, value] for step, value in self.held_out.items()]
        about = {"losses": self.losses, "held_out": looks, "best": self.best}
        self._publish(self._pieces / f"training-{self.done}.safetensors", moments, about)
        for pattern, kept in (("best", self.best), ("training", self.done)):
            for file in self._pieces.glob(f"{pattern}-*.safetensors*"):
                if not file.name.startswith(f"{pattern}-{kept}.safetensors"):
                    file.unlink()

    def _finite(self, loss: float, where: str) -> float:
        if not math.isfinite(loss):
            raise MkaError(f"distilling: the loss is {loss} {where}", "Lower --heal-rate.")
        return loss

    def _publish(self, file: Path, tensors: Mapping[str, Tensor], about: dict[str, Any]) -> None:
        with publish_file(file) as writing:
            save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, writing)
        seal(file, about)

    def _resume(self) -> None:
        """Go on from the last look of an earlier run, if there is one whole."""
        found = sorted(self._pieces.glob("training-*.safetensors"), key=lambda file: int(file.stem.split("-")[1]))
        for file in reversed(found):
            about = sealed(file)
            if about is None or sealed(self._pieces / f"best-{about['best']}.safetensors") is None:
                continue
            self.losses, self.best = about["losses"], about["best"]
            self.held_out = {int(step): value for step, value in about["held_out"]}
            tensors = load_file(file, device=str(self._device))
            for name, tensor in self._trainable.items():
                tensor.data.copy_(tensors[f"weight.{name}"])
                state = {key: tensors[f"{key}.{name}"] for key in MOMENTS}
                self._optimizer.state[tensor] = {"step": torch.tensor(float(self.done)), **state}
            return

    def _rate(self) -> float:
        steps = self._healing.steps
        warm = min(1.0, (self.done + 1) / max(1.0, WARM_UP * steps))
        return self._healing.rate * warm * 0.5 * (1 + math.cos(math.pi * self.done / steps))

    def _batch(self) -> list[int]:
        """Return the windows of the next step: every pass over the text takes them in an order of its own."""
        size, start = min(self._healing.batch, len(self._trained)), self.done * self._healing.batch
        chosen = []
        for number in range(start, start + size):
            epoch, place = divmod(number, len(self._trained))
            order = torch.randperm(len(self._trained), generator=torch.Generator().manual_seed(SEED + epoch))
            chosen.append(self._trained[int(order[place])])
        return chosen

    def _loss(self, window: int) -> tuple[Tensor, Tensor]:
        """Return KL(original ‖ model) and the distance of the last hidden states, means over a window's positions."""
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            logits = self._model(self._ids[window : window + 1].to(self._device), use_cache=False).logits[0].float()
        tokens, log_probs, states = (
            torch.from_numpy(answers[window].copy()).to(self._device)
            for answers in (self._teacher.tokens, self._teacher.log_probs, self._teacher.states)
        )
        ours = logits.gather(1, tokens.long()) - logits.logsumexp(dim=1, keepdim=True)
        divergence = divergence_of(log_probs.float(), ours)
        return divergence, functional.mse_loss(unit(self._stream[0].float()), states.float())

    def _note_stream(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._stream = inputs[0]


def divergence_of(teacher: Tensor, ours: Tensor) -> Tensor:
    """Return the mean KL of distributions of which the log-probabilities of some tokens, (n, k), are known.

    All other tokens count as one, so it is a lower bound of the KL over all.
    """
    p, rest = teacher.exp(), (1 - teacher.exp().sum(dim=1)).clamp_min(0.0)
    ours_rest = torch.log((1 - ours.exp().sum(dim=1)).clamp_min(FLOOR))
    others = torch.where(rest > 0, rest * (rest.clamp_min(FLOOR).log() - ours_rest), 0.0)
    return ((p * (teacher - ours)).sum(dim=1) + others).mean()


def activation_bytes(model: Outline, tokens: int) -> int:
    """Return what the backward pass needs of all layers' inner values for so many tokens, in float32."""
    width = model.layer[model.architecture.layer["gate"]][0]
    return 4 * tokens * model.num_layers * (12 * model.hidden_size + 4 * width)


def distill_bytes(model: Outline, tokens: int) -> int:
    """Return the memory of ``distill``: weights, gradients, two moments, inner values and logits of a window."""
    inner = min(activation_bytes(model, tokens), max(CHECKPOINTED, activation_bytes(model.with_layers(1), tokens)))
    return 4 * 4 * model.parameters + inner + 4 * 4 * tokens * model.vocab_size
