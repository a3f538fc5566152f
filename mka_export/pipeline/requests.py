"""What is asked for, checked before any model is there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mka_export.errors import UsageError, unknown_name
from mka_export.heal.distill import Healing
from mka_export.merge.choose import Settings
from mka_export.merge.measures import DEFAULT, MEASURES
from mka_export.merge.methods import METHODS
from mka_export.merge.plan import read_plan
from mka_export.merge.stage import layers_to_remove, removable, require_share
from mka_export.options import AUTO, ITERATIVE, ConvertOptions, HealOptions, LimitOptions, MergeOptions, TextOptions
from mka_export.parity.comparison import HEALED, MERGED, ORIGINAL, QUANTIZED
from mka_export.parity.runtimes import RUNTIMES
from mka_export.parity.statistics import MIN_WINDOWS
from mka_export.pipeline.asking import MMLU
from mka_export.pipeline.job import CALIBRATION, DEPTH, EVAL, PARITY, SAMPLED
from mka_export.report import REPORT_FILES
from mka_export.target import Limits, Target, load_converter, load_target
from mka_export.workspace import MANIFEST


def check_merge(options: MergeOptions) -> None:
    """Check what can be checked of a merge before the model is there.

    Raises:
        UsageError: options are missing, unknown, or contradict each other.
    """
    if (options.ratio is None) == (options.plan is None):
        raise UsageError("give either --ratio or --plan", "For example --ratio 0.2.")
    if isinstance(options.ratio, float):
        require_share("--ratio", options.ratio)
    if options.max_size is not None and options.ratio != AUTO:
        raise UsageError("--max-size goes with --ratio auto", "Leave one of them out, or give both.")
    if options.plan is not None:
        read_plan(options.plan)
    if options.method not in METHODS:
        raise UsageError(unknown_name("--method", options.method, METHODS))
    if options.measure not in MEASURES:
        raise UsageError(unknown_name("--measure", options.measure, MEASURES))
    if (options.measure, options.schedule) != (DEFAULT, ITERATIVE) and not METHODS[options.method].measured:
        raise UsageError(
            f"--measure and --schedule are for methods that compare layers; {options.method} has its own way to choose",
            "Leave them out.",
        )
    if options.alpha is not None and options.method != "mka-paper":
        raise UsageError(f"--alpha is for --method mka-paper; {options.method} does not average", "Leave it out.")


def merge_settings(options: MergeOptions, layers: int) -> Settings:
    """Return what decides a merge of a model with so many layers, by its ratio; with ``auto``, as deep as can be.

    Raises:
        UsageError: the ratio does not fit the model.
    """
    protect = METHODS[options.method].protect if options.protect is None else options.protect
    if options.ratio == AUTO:
        remove = removable(layers, protect)
    else:
        assert options.ratio is not None
        remove = layers_to_remove(float(options.ratio), layers, protect)
    return Settings(remove, options.method, options.measure, options.schedule, protect, options.alpha)


def heal_settings(options: HealOptions) -> Healing:
    """Return how a merged model is trained."""
    return Healing(options.heal_steps, options.heal_batch, options.heal_rate, options.heal_train)


def check_limit(merge: MergeOptions, heal: HealOptions, targets: Sequence[Target], texts: TextOptions) -> None:
    """Check that ``--ratio auto`` has a limit to go by.

    Raises:
        UsageError: it has none, or it cannot be judged by.
    """
    if merge.ratio != AUTO:
        return
    if not targets:
        raise UsageError("--ratio auto needs a target, whose artifact keeps to the limit", "Leave out 'merge'.")
    if merge.max_size is not None:
        return
    if heal.heal != "none":
        raise UsageError(
            "--ratio auto measures what merging leaves, before it is healed",
            "Find the depth first, and give it as --ratio with --heal.",
        )
    if all(target.compression.max_ppl_ratio is None for target in targets):
        raise UsageError("--ratio auto: there is no limit", "Give --max-ppl-ratio or --max-size.")
    if texts.windows <= MIN_WINDOWS:
        raise UsageError(
            f"--ratio auto: {texts.windows} windows are too few to judge by",
            f"Give --windows {MIN_WINDOWS + 1} or more.",
        )


def load_targets(convert: ConvertOptions, limits: LimitOptions) -> list[Target]:
    """Return the targets asked for, with the limits and options of the command line.

    Raises:
        UsageError: none is named, one is unknown, or one is named twice.
    """
    if not convert.to:
        raise UsageError("no --to", "Say what to make, for example --to gguf-q4; 'mka-export targets' lists them.")
    targets = []
    for name in convert.to:
        target = load_target(name)
        load_converter(target.converter)
        if target.runtime not in RUNTIMES:
            raise UsageError(f"target {target.name}: {unknown_name('runtime', target.runtime, RUNTIMES)}")
        options = dict(target.options)
        if convert.max_fallback is not None:
            options["max_fallback"] = convert.max_fallback
        targets.append(
            dataclasses.replace(
                target,
                options=options,
                activations=target.activations and convert.imatrix == "auto",
                conversion=dataclasses.replace(target.conversion, **given_limits(limits, "conversion_")),
                compression=dataclasses.replace(target.compression, **given_limits(limits, "")),
            )
        )
    names = [target.name for target in targets]
    if len(set(names)) < len(names):
        raise UsageError(f"--to names a target twice: {', '.join(names)}")
    stages = {SAMPLED, DEPTH, ORIGINAL, MERGED, HEALED, CALIBRATION, PARITY, QUANTIZED, MMLU, EVAL}
    if clash := {*stages, MANIFEST, *REPORT_FILES} & set(names):
        raise UsageError(f"a target cannot be called {clash.pop()}", "Rename its file.")
    return targets


def given_limits(limits: LimitOptions, prefix: str) -> dict[str, float]:
    """Return the limits set on the command line, by their names in ``Limits``."""
    values = {f.name: getattr(limits, prefix + f.name) for f in dataclasses.fields(Limits)}
    return {name: value for name, value in values.items() if value is not None}
