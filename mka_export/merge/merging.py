"""Merging itself: one choice after another, done, and followed by the model under merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from mka_export.merge.choose import Settings
from mka_export.merge.finished import Finished
from mka_export.merge.methods import METHODS
from mka_export.merge.plan import Plan
from mka_export.merge.steps import Choice, Step
from mka_export.merge.trajectory import Trajectory
from mka_export.merge.views import Views
from mka_export.models.checkpoint import CONFIG, Checkpoint
from mka_export.models.checkpoint_writer import CheckpointWriter, copy_tokenizer
from mka_export.progress import Progress
from mka_export.publish import write_json


def merge(views: Views, settings: Settings | Plan, finished: Finished, progress: Progress) -> None:
    """Choose layers and fuse them, until as many are gone as ``settings`` say.

    Args:
        views: the original model; afterwards, the merged one.
        settings: how to choose, or a plan to replay.
        finished: what earlier runs did is taken from there, and what is done put there.

    Raises:
        UsageError: there are not as many layers as are to go.
        MkaError: the model is damaged.
    """
    method, trajectory = METHODS[settings.method], views.everything
    with progress.task(f"removing {settings.remove} layers ({settings.method})", settings.remove) as task:

        def follow(step: Step) -> None:
            choice = step.choice(trajectory.spans)
            views.replace(choice, finished.weights)
            task.advance(choice.last - choice.position)

        if method.stepwise(settings.schedule):
            for step in finished.resume(settings.remove):
                follow(step)
        done = len(finished.steps)
        if isinstance(settings, Plan):
            choices = _replay(settings.steps[done:], trajectory)
        else:
            choices = method.choose(replace(settings, remove=settings.remove - done), views)
        for choice in choices:
            step = choice.step(trajectory.spans, trajectory.attention(choice))
            follow(finished.add(step, partial(method.fuse, trajectory, choice)))


def _replay(steps: Sequence[Step], trajectory: Trajectory) -> Iterator[Choice]:
    for step in steps:
        yield step.choice(trajectory.spans)


def write_checkpoint(trajectory: Trajectory, out: Path) -> None:
    """Write the model under merge into the folder ``out``, with what belongs to the original: tokenizer, model card."""
    checkpoint: Checkpoint = trajectory.runner.checkpoint
    architecture = checkpoint.architecture
    with CheckpointWriter(out) as writer:
        for name in checkpoint.shards:
            if architecture.split(name)[0] is None:
                writer.add(name, checkpoint.tensor(name))
        for position, layer in enumerate(trajectory.layers):
            stored = checkpoint.layer(layer.attention)
            weights = stored if layer.file is None else trajectory.weights(position)
            for name, tensor in stored.items():
                writer.add(architecture.layer_name(position, name), weights[name].to("cpu", tensor.dtype))
    kept = [layer.attention for layer in trajectory.layers]
    write_json(out / CONFIG, architecture.config_for_layers(checkpoint.config, kept))
    copy_tokenizer(checkpoint.path, out)
    _write_card(checkpoint.path / "README.md", out / "README.md", f"{len(kept)} of {checkpoint.num_layers} layers")


def _write_card(source: Path, out: Path, what: str) -> None:
    """Carry the front matter of a model card (licence, languages), with a line on what was done."""
    text = source.read_text(encoding="utf-8") if source.is_file() else ""
    front = text[: text.index("\n---", 3) + 4] + "\n\n" if text.startswith("---") and "\n---" in text[3:] else ""
    out.write_text(f"{front}# Merged\n\n{what}, merged by mka-export: see plan.json.\n", encoding="utf-8")
