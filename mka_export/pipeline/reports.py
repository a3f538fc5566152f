"""Reports from what lies in output folders: written anew, or of the shards of one check together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mka_export.data import load_json
from mka_export.errors import MkaError, UsageError
from mka_export.parity.comparison import COMPRESSION, CONVERSION, QUANTIZED
from mka_export.parity.mmlu.figures import Asked
from mka_export.pipeline.asking import publish_asked, read_asked
from mka_export.pipeline.job import PARITY, show
from mka_export.pipeline.measured import Measured
from mka_export.progress import Progress
from mka_export.report import REPORT, renew_cards, valid_report, write_reports
from mka_export.target import Limits
from mka_export.workspace import MANIFEST, Workspace, check_ours, published, read_record


def renew(folders: Sequence[Path], out: Path | None, *, as_json: bool, quiet: bool) -> int:
    """Judge what was measured in an output folder by the limits of its report, and write that anew.

    Returns:
        the exit code.

    Raises:
        UsageError: there are several folders, or ``out`` is given.
        MkaError: there is no report, or not what it was made from.
    """
    if len(folders) > 1 or out is not None:
        raise UsageError("several folders, or --out, are for --merge", "Give one folder, or --merge.")
    folder = folders[0]
    report = read_report(folder)
    with Workspace(folder, Progress(quiet=quiet)) as workspace:
        for entry in report["targets"]:
            unanswered = report["mmlu"] is not None and entry["mmlu"] is None  # it failed, and stays so
            if entry["artifact"] is not None and not unanswered:
                _rejudge(entry, _measured(folder, entry), _asked(folder, entry))
        return _finish(report, workspace, load_json(folder / MANIFEST), as_json)


def join(folders: Sequence[Path], out: Path | None, *, as_json: bool, quiet: bool) -> int:
    """Join the shards of one check, and judge them as one that was not divided would be.

    Returns:
        the exit code.

    Raises:
        UsageError: they are not all of one check, or ``out`` is not given.
        MkaError: one has no report, or not what it was made from.
    """
    if out is None:
        raise UsageError("--merge needs a folder for what is joined", "Give --out.")
    if out.resolve() in [folder.resolve() for folder in folders]:
        raise UsageError(f"--out {out} holds one of the shards", "Choose another --out.")
    check_ours(out)
    shards = _in_order({folder: read_report(folder) for folder in folders})
    _require_one_check(shards)
    report = {
        **next(iter(shards.values())),
        "shard": None,
        "stages": [stage for each in shards.values() for stage in each["stages"]],
        "peak_memory_bytes": max((each["peak_memory_bytes"] or 0 for each in shards.values()), default=0),
        "warnings": list(dict.fromkeys(line for each in shards.values() for line in each["warnings"])),
    }
    with Workspace(out, Progress(quiet=quiet)) as workspace:
        for entry in report["targets"]:
            parts = [published(folder, f"{PARITY}/{entry['name']}") for folder in shards]
            joined = Measured.join([Measured.read(part.path) for part in parts])
            inputs = {"joined": [dict(part.files) for part in parts]}
            workspace.stage(f"{PARITY}/{entry['name']}", inputs, partial(_write, joined))
            answers = [answered for folder in shards if (answered := _asked(folder, entry)) is not None]
            asked = Asked.join(answers) if len(answers) == len(shards) else None
            if asked is not None:
                publish_asked(asked, workspace, entry["name"], inputs)
            failures = [] if asked or report["mmlu"] is None else _errors(entry["name"], shards.values())
            _rejudge(entry, joined, asked, failures)
        return _finish(report, workspace, load_json(folders[0] / MANIFEST), as_json)


def read_report(folder: Path) -> dict[str, Any]:
    """Read the report in an output folder.

    Raises:
        MkaError: there is none, or it is none.
    """
    try:
        return valid_report(load_json(folder / REPORT))
    except OSError as error:
        raise MkaError(
            f"{folder} holds no {REPORT}: {error.strerror}", "Give an output folder of mka-export."
        ) from error
    except (ValueError, MkaError) as error:
        raise MkaError(f"{folder / REPORT} is no report of this mka-export: {error}", "Make it again.") from error


def _in_order(shards: Mapping[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Return the reports of all shards of one check, the first first.

    Raises:
        UsageError: one is missing, there twice, none, or of another check.
    """
    for folder, report in shards.items():
        if report["shard"] is None:
            raise UsageError(f"{folder} is no shard: all was measured there", "Leave it out.")
    counts = {report["shard"]["count"] for report in shards.values()}
    if len(counts) > 1:
        raise UsageError(f"these are shards of {' and of '.join(map(str, sorted(counts)))}", "Join those of one check.")
    (count,) = counts
    found: dict[int, Path] = {}
    for folder, report in shards.items():
        index = report["shard"]["index"]
        if index in found:
            raise UsageError(f"shard {index}/{count} is in {found[index]} and in {folder}", "Leave one out.")
        found[index] = folder
    if missing := [str(index) for index in range(1, count + 1) if index not in found]:
        raise UsageError(f"of {count} shards these are missing: {', '.join(missing)}", "Give the folders of all.")
    return {found[index]: shards[found[index]] for index in range(1, count + 1)}


def _require_one_check(shards: Mapping[Path, Mapping[str, Any]]) -> None:
    """Check that all shards depend on the same: model, artifacts, evaluation, versions.

    Raises:
        UsageError: they do not.
    """
    (first, expected), *others = [(folder, _dependencies(folder, report)) for folder, report in shards.items()]
    for folder, found in others:
        if different := sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key)):
            raise UsageError(
                f"{folder} is of another check than {first}: these differ: {', '.join(different)}",
                "Run one of them again.",
            )


def _dependencies(folder: Path, report: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"targets": [entry["name"] for entry in report["targets"]]}
    found |= {f"{key} of the questions": value for key, value in (report["mmlu"] or {}).items() if key != "source"}
    for name in found["targets"]:
        inputs = (read_record(folder / PARITY / name) or {}).get("inputs", {})
        found |= {f"{key} of {name}": value for key, value in inputs.items() if key != "shard"}
    return found


def _measured(folder: Path, entry: Mapping[str, Any]) -> Measured:
    """Return what the entry of a target was made from."""
    found = Measured.read(published(folder, f"{PARITY}/{entry['name']}").path)
    if QUANTIZED in [step["name"] for step in entry["steps"]]:
        found = found.with_step(Measured.read(published(folder, f"{QUANTIZED}/{entry['name']}").path))
    return found


def _asked(folder: Path, entry: Mapping[str, Any]) -> Asked | None:
    """Return the answers that the entry of a target was made from, if questions were asked."""
    if entry["mmlu"] is None:
        return None
    return read_asked(folder, [step["name"] for step in entry["mmlu"]["steps"]], entry["name"])


def _write(measured: Measured, folder: Path, pieces: Path) -> None:
    measured.write(folder)


def _errors(target: str, reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return why a target failed, in whichever of the reports it did."""
    errors = (entry["error"] for report in reports for entry in report["targets"] if entry["name"] == target)
    return [error for error in dict.fromkeys(errors) if error]


def _rejudge(entry: dict[str, Any], measured: Measured, asked: Asked | None, failures: Sequence[str] = ()) -> None:
    """Judge a target again, by the limits that its entry names."""
    conversion, compression = (
        Limits(**entry["comparisons"].get(kind, {"limits": {}})["limits"]) for kind in (CONVERSION, COMPRESSION)
    )
    entry |= measured.judged(conversion, compression, entry["artifact"]["details"].get("warnings", []), asked, failures)


def _finish(report: dict[str, Any], workspace: Workspace, manifest: Mapping[str, Any], as_json: bool) -> int:
    written = write_reports(report, workspace.path)
    renew_cards(written, workspace.path)
    workspace.write_manifest({key: value for key, value in manifest.items() if key not in ("format", "files")})
    return show(written, as_json=as_json)
