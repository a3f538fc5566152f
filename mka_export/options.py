"""Every option once: the frozen objects the pipeline is given, and the command-line flags made from them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import click

from mka_export.needs import parse_size

ITERATIVE, ONE_SHOT = "iterative", "one-shot"
AUTO = "auto"

Command = Callable[..., Any]
FILE = click.Path(path_type=Path, dir_okay=False)


class FiniteRange(click.FloatRange):
    """A range without infinity, and without NaN, which click finds inside every range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Turn what was typed into a number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is no finite number.", param, ctx)
        return number


class Ratio(click.types.FloatParamType):
    """A number, or ``auto``."""

    name = "share|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn what was typed into one of both."""
        try:
            return AUTO if value == AUTO else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto.", param, ctx)


class Size(click.types.IntParamType):
    """Bytes, with a unit or without: 800MB, 1.5GB, 700MiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Turn what was typed into a number of bytes."""
        try:
            return parse_size(str(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


@dataclass(frozen=True)
class Shard:
    """One part of work that is shared out.

    Attributes:
        index: which, from 1.
        count: of how many.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def own(self) -> slice:
        """Which items of a list are its own: every ``count``-th."""
        return slice(self.index - 1, None, self.count)


class ShardType(click.types.StringParamType):
    """One part of several: 3/8."""

    name = "part/parts"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn what was typed into a shard."""
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(value))
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            self.fail(f"{value!r} is no part of several, as 3/8 is.", param, ctx)
        return Shard(int(found[1]), int(found[2]))


def option(default: Any, help: str, **click_arguments: Any) -> Any:
    """Declare a field of an options object, and with it its flag (``--`` and the name with dashes)."""
    return field(default=default, metadata={"help": help, **click_arguments})


@dataclass(frozen=True)
class TextOptions:
    """Which text the model is looked at with, and which it is judged by."""

    calibration: str | None = option(
        None,
        "Text to calibrate with: a UTF-8 file, hub:NAME[:CONFIG[:SPLIT]] for a dataset of the hub, or self for text "
        "sampled from MODEL. Default: the embedded text.",
        type=str,
    )
    calibration_tokens: int = option(16384, "Tokens of it to use, in windows of 512.", type=click.IntRange(min=512))
    text: Path | None = option(None, "Text file to evaluate on, UTF-8. Default: the embedded text.", type=FILE)
    windows: int = option(16, "Evaluation windows, evenly spread over the text.", type=click.IntRange(min=2))
    window_tokens: int = option(256, "Tokens in each.", type=click.IntRange(min=16))


@dataclass(frozen=True)
class MmluOptions:
    """Which questions the models are asked."""

    mmlu: str | None = option(
        None,
        "Ask MMLU's questions too: a folder with its dev and test, CSV or parquet, or hub for the hub's dataset.",
        type=str,
    )
    mmlu_questions: int = option(570, "Questions, drawn evenly from all subjects.", type=click.IntRange(min=1))
    mmlu_shots: int = option(5, "Answered examples before each question.", type=click.IntRange(0, 5))
    mmlu_seed: int = option(0, "By which the questions are drawn.", type=click.IntRange(min=0))


@dataclass(frozen=True)
class MergeOptions:
    """How layers are chosen and merged."""

    ratio: float | str | None = option(
        None,
        "Share of layers to remove: 0.1 of 30 layers removes 3. Rounded to the nearest layer, halves up. auto, where "
        "targets are made: as many as --max-ppl-ratio or the target allows, or as few as --max-size asks for.",
        type=Ratio(),
    )
    max_size: int | None = option(None, "With --ratio auto: what each artifact may take, e.g. 800MB.", type=Size())
    method: str = option(
        "mka",
        "How layers are chosen and become one: mka, mka-paper, or one to compare with: tail, shortgpt, pruneme, sleb, "
        "laco, replaceme.",
        type=str,
    )
    measure: str = option(
        "npib", "Which layers are alike: npib, cosine, angular, euclidean, cka or block-influence.", type=str
    )
    schedule: str = option(
        ITERATIVE,
        "iterative: measure again after each merge. one-shot: choose all pairs from one similarity matrix.",
        type=click.Choice([ITERATIVE, ONE_SHOT]),
    )
    alpha: float | None = option(
        None, "Weight of the lower layer in an average. Default: the similarity.", type=FiniteRange(0.0, 1.0)
    )
    protect: int | None = option(
        None,
        "Early layers that take no part. Default: 4 with mka and mka-paper, else 0.",
        type=click.IntRange(min=0),
    )
    plan: Path | None = option(None, "Replay this merge plan instead of choosing.", type=FILE)


@dataclass(frozen=True)
class HealOptions:
    """Whether and how the merged model is trained."""

    heal: str = option(
        "none",
        "distill: train the merged model on what the original says of the calibration text. It holds the whole merged "
        "model in memory.",
        type=click.Choice(["none", "distill"]),
    )
    heal_steps: int = option(240, "Updates of the weights, at most.", type=click.IntRange(min=1))
    heal_tokens: int = option(131_072, "Tokens of the calibration text to train on.", type=click.IntRange(min=512))
    heal_batch: int = option(2, "Windows of 512 tokens in a step.", type=click.IntRange(min=1))
    heal_rate: float = option(5e-5, "Learning rate of AdamW.", type=FiniteRange(min=0, min_open=True))
    heal_train: str = option(
        "all", "all parameters, or those of merged layers only.", type=click.Choice(["all", "merged"])
    )


@dataclass(frozen=True)
class CompareOptions:
    """Which merges to compare."""

    ratios: str = option("0.1,0.2,0.3,0.4", "Shares of layers to remove, with commas between.", type=str)
    methods: str = option(
        "all",
        "Methods as in --method, with commas between, on another schedule as mka-paper:one-shot; or all.",
        type=str,
    )
    measure: str = option("npib", "Which layers are alike, for methods that compare them by a measure.", type=str)
    protect: int | None = option(
        None,
        "Early layers that take no part. Default: 4 with mka and mka-paper, else 0.",
        type=click.IntRange(min=0),
    )


@dataclass(frozen=True)
class EvalOptions:
    """Which tasks to evaluate on, and what to compare with."""

    tasks: str = option("", "Tasks of lm-evaluation-harness, with commas between.", type=str)
    include: Path | None = option(
        None,
        "Folder with more task files; Python functions that they name are run.",
        type=click.Path(path_type=Path),
    )
    limit: int | None = option(None, "Documents of each task. Default: all.", type=click.IntRange(min=1))
    shots: int | None = option(
        None, "Examples before each question. Default: as the task says.", type=click.IntRange(min=0)
    )
    against: str | None = option(
        None,
        "The model to compare with, as MODEL elsewhere, or none. Default: the one that OUT was made from.",
        type=str,
    )


@dataclass(frozen=True)
class ConvertOptions:
    """What to make."""

    to: tuple[str, ...] = option(
        (), "Target: a name from 'mka-export targets', or a .toml file. Can be repeated.", multiple=True
    )
    imatrix: str = option(
        "auto",
        "Let the calibration text guide the quantizer. auto: at 4 bits and fewer.",
        type=click.Choice(["auto", "none"]),
    )
    attribute: bool = option(
        False,
        "Measure each artifact's own weights in torch too, to tell what rounding lost from what the runtime does; they "
        "are unpacked for it, and deleted.",
        is_flag=True,
    )
    max_fallback: float | None = option(
        None,
        "Refuse an artifact with a larger share of weights in another type than asked, because their rows do not fit.",
        type=FiniteRange(0.0, 1.0),
    )


@dataclass(frozen=True)
class LimitOptions:
    """Parity limits that override the target's."""

    max_ppl_ratio: float | None = option(
        None, "Artifact perplexity / original perplexity.", type=FiniteRange(min=0, min_open=True)
    )
    max_mean_kl: float | None = option(None, "Mean KL divergence from the original, nats.", type=FiniteRange(min=0))
    min_top1: float | None = option(
        None, "Share of positions where both prefer the same token.", type=FiniteRange(0, 1)
    )
    max_mmlu_drop: float | None = option(None, "Share of MMLU's questions that may be lost.", type=FiniteRange(0, 1))
    conversion_max_ppl_ratio: float | None = option(
        None,
        "Artifact perplexity / that of the checkpoint it was made from.",
        type=FiniteRange(min=0, min_open=True),
    )
    conversion_max_mean_kl: float | None = option(None, "Mean KL from that checkpoint, nats.", type=FiniteRange(min=0))
    conversion_min_top1: float | None = option(None, "Top-1 agreement with that checkpoint.", type=FiniteRange(0, 1))
    conversion_max_mmlu_drop: float | None = option(
        None, "Share of MMLU's questions that may be lost to that checkpoint.", type=FiniteRange(0, 1)
    )


@dataclass(frozen=True)
class CheckOptions:
    """What is checked, where a file says it, and which part of that here."""

    config: Path | None = option(
        None, "TOML file that names model, artifacts, limits and data, instead of ARTIFACT and --against.", type=FILE
    )
    shard: Shard | None = option(
        None,
        "Measure one part of several, on several machines: 3/8 is the third of eight. 'mka-export report --merge' joins them.",
        type=ShardType(),
    )


@dataclass(frozen=True)
class DeviceOptions:
    """Where to compute."""

    device: str = option("auto", "For torch: cpu, cuda, cuda:N or auto.", type=str)
    gpu_layers: int = option(0, "Layers llama.cpp puts on the GPU; -1 for all.", type=click.IntRange(min=-1))


@dataclass(frozen=True)
class PreviewOptions:
    """Whether to only look ahead."""

    dry_run: bool = option(
        False, "Say what the job takes of disk and memory, before anything is fetched; stop there.", is_flag=True
    )


@dataclass(frozen=True)
class OutputOptions:
    """Where results go, and how much is said."""

    out: Path | None = option(None, "Output folder.", type=click.Path(path_type=Path))
    revision: str | None = option(None, "Commit, tag or branch of a hub model.", type=str)
    json: bool = option(False, "Print the report as JSON on stdout.", is_flag=True)
    quiet: bool = option(False, "No progress on stderr.", is_flag=True)


@dataclass(frozen=True)
class ServeOptions:
    """Where the page is served, and how."""

    setup: bool = option(
        False, "Bring the page's scripts with npm, once: pinned versions, checked against their hashes.", is_flag=True
    )
    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 opens the page to the network.", type=str)
    port: int = option(8765, "Port; 0 takes any that is free.", type=click.IntRange(0, 65535))
    tls: bool = option(
        False,
        "Serve https with a new, self-signed certificate, so that browsers on other devices give the page threads.",
        is_flag=True,
    )


def options(**groups: type) -> Callable[[Command], Command]:
    """Give a command the flags of some options objects; it receives the objects, by the names given here."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def call(**values: Any) -> Any:
            for name, group in groups.items():
                values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
            return command(**values)

        for group in reversed(groups.values()):
            for f in reversed(fields(group)):
                arguments = dict(f.metadata)
                default = None if f.default is MISSING else f.default
                shown = default not in (None, False, ())
                name = "--" + f.name.replace("_", "-")
                call = click.option(name, f.name, default=default, show_default=shown, **arguments)(call)
        return call

    return decorate
