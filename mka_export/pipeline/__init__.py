"""The stages in order: source, merge, convert, measure, report. The only place that knows all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from mka_export.errors import UsageError, unknown_name
from mka_export.inputs import CALIBRATION_WINDOW
from mka_export.merge.measures import MEASURES
from mka_export.merge.needs import similarity_need
from mka_export.merge.stage import SIMILARITY, similarity_stage
from mka_export.models.outline import Outline
from mka_export.needs import require_room
from mka_export.options import (
    ConvertOptions,
    DeviceOptions,
    HealOptions,
    LimitOptions,
    MergeOptions,
    MmluOptions,
    OutputOptions,
    PreviewOptions,
    TextOptions,
)
from mka_export.pipeline.export import Export
from mka_export.pipeline.job import SAMPLED, Job, stem
from mka_export.pipeline.machine import examine
from mka_export.pipeline.requests import check_limit, check_merge, load_targets
from mka_export.report import print_forecast, print_json, print_loss, print_machine
from mka_export.workspace import Workspace

SIMILARITIES = "similarity"  # a stage folder


def run(
    model: str,
    texts: TextOptions,
    merge: MergeOptions,
    heal: HealOptions,
    convert: ConvertOptions,
    limits: LimitOptions,
    mmlu: MmluOptions,
    device: DeviceOptions,
    output: OutputOptions,
    preview: PreviewOptions,
) -> int:
    """Merge a model, make every target from it, and measure each against the original; returns the exit code."""
    check_merge(merge)
    targets = load_targets(convert, limits)
    check_limit(merge, heal, targets, texts)
    export = Export(model, merge, heal, targets, texts, device, output, "mka", mmlu, attribute=convert.attribute)

    def work() -> int:
        if export.auto:
            export.auto.settle()
        while True:
            export.merge()
            export.heal()
            made = export.make()
            if not (export.auto and export.auto.step_back(made)):
                return export.finish(made)

    return _carry_out(export, preview, work)


def merge_only(
    model: str,
    texts: TextOptions,
    merge: MergeOptions,
    heal: HealOptions,
    device: DeviceOptions,
    output: OutputOptions,
    preview: PreviewOptions,
) -> int:
    """Merge a model, and heal it if that is asked for; prints its folder, or JSON, and on stderr what was lost."""
    check_merge(merge)
    check_limit(merge, heal, [], texts)
    export = Export(model, merge, heal, [], texts, device, output, "mka")

    def work() -> int:
        made = export.merge()
        made = export.heal() or made
        export.write_manifest()
        lost = export.judge(made)
        export.write_manifest()
        print_loss(lost, Console(stderr=True, soft_wrap=True), quiet=output.quiet)
        if output.json:
            print_json(export.describe(made, lost))
        else:
            print(made.path)
        return 0

    return _carry_out(export, preview, work)


def convert_only(
    model: str,
    texts: TextOptions,
    convert: ConvertOptions,
    limits: LimitOptions,
    mmlu: MmluOptions,
    device: DeviceOptions,
    output: OutputOptions,
    preview: PreviewOptions,
) -> int:
    """Make every target from a model as it is, and measure each against it; returns the exit code."""
    rest = (texts, device, output, "export", mmlu)
    export = Export(model, None, HealOptions(), load_targets(convert, limits), *rest, attribute=convert.attribute)
    return _carry_out(export, preview, lambda: export.finish(export.make()))


def _carry_out(export: Export, preview: PreviewOptions, work: Callable[[], int]) -> int:
    """Do the work; or, to only look ahead, print what it will take of this machine: 0 where it has that, else 1."""
    if not preview.dry_run:
        with export:
            return work()
    forecast = export.forecast()
    if export.output.json:
        print_json(forecast)
    else:
        print_forecast(forecast, Console())
    return 1 if forecast["shortfalls"] else 0


def doctor(model: str | None, ratio: float | None, to: tuple[str, ...], *, as_json: bool) -> int:
    """Print what is installed and usable, and what a job will take; returns 1 where something is missing, else 0."""
    forecast = None
    if model is not None:
        merge = MergeOptions(ratio=ratio) if ratio is not None else None
        if merge is not None:
            check_merge(merge)
        targets = load_targets(ConvertOptions(to=to), LimitOptions()) if to else []
        rest = (TextOptions(), DeviceOptions(), OutputOptions(), "mka")
        forecast = Export(model, merge, HealOptions(), targets, *rest).forecast()
    elif ratio is not None or to:
        raise UsageError("--ratio and --to are for a MODEL", "For example: mka-export doctor llama3-8b --to gguf-q4")
    machine = examine()
    if as_json:
        print_json({"machine": machine, "job": forecast})
    else:
        print_machine(machine, Console())
        if forecast is not None:
            print()
            print_forecast(forecast, Console())
    broken = any(runtime["error"] for runtime in machine["runtimes"].values())
    return 1 if broken or (forecast and forecast["shortfalls"]) else 0


def similarity(
    model: str, measures: tuple[str, ...], texts: TextOptions, device: DeviceOptions, output: OutputOptions
) -> int:
    """Draw how alike all layers of a model are, by some measures or all; prints the folder or the matrices."""
    for name in measures:
        if name not in MEASURES:
            raise UsageError(unknown_name("--measure", name, MEASURES))
    chosen = list(dict.fromkeys(measures or MEASURES))
    job = Job(model, texts, device, output, f"{stem(model)}-similarity")
    job.spare_the_model(SAMPLED, SIMILARITIES)
    with Workspace(job.out, job.progress) as job.workspace:
        job.open()
        windows = job.calibration
        about = windows.describe()
        inputs = {**job.inputs(job.original), "calibration": about, "measures": chosen}

        def make(folder: Path, pieces: Path) -> None:
            need = similarity_need(Outline.of_checkpoint(job.original), windows.ids.size, CALIBRATION_WINDOW)
            require_room(folder, need.scratch, "looking at the layers", "Free space there, or choose another --out.")
            similarity_stage(job.runner, windows.ids, about, chosen, folder, pieces, job.progress)

        made = job.workspace.stage(SIMILARITIES, inputs, make)
        job.workspace.write_manifest(job.about())
        print((made.path / SIMILARITY).read_text(encoding="utf-8") if output.json else made.path)
    return 0
