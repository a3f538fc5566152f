"""A model card for each artifact, as the Hugging Face hub reads it, with the licence files that go with the weights.

The front matter follows https://huggingface.co/docs/hub/model-cards, results https://huggingface.co/docs/hub/eval-results.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mka_export.errors import MkaError
from mka_export.needs import size
from mka_export.publish import publish_folder
from mka_export.report.figures import questions_source, reasons
from mka_export.report.markdown import code, escape, table
from mka_export.report.summary import figure_lines
from mka_export.report.terminal import spans_text, text_source

CARDS, CARD, RESULTS = "card", "README.md", ".eval_results"
LIBRARIES = {"llama.cpp": "gguf"}  # the hub's name of a runtime's format; the others run ONNX
MMLU = ("cais/mmlu", "mmlu")  # the hub's dataset, and what its results are called
VERDICTS = {
    "pass": "It keeps every limit that was set, with the whole 95 % interval.",
    "fail": "**It breaks a limit that was set, and is published with that knowledge.**",
    "inconclusive": "**Too little was measured to tell whether it keeps the limits that were set.**",
}


def write_cards(report: Mapping[str, Any], folder: Path, licence_files: Mapping[str, Path]) -> None:
    """Write ``card/TARGET/`` in ``folder`` for every artifact of a report, each all or nothing.

    Args:
        report: as ``valid_report`` returned it.
        folder: the output folder.
        licence_files: what must travel with the weights, by name.

    Raises:
        MkaError: a file cannot be read or written.
    """
    for target in report["targets"]:
        if target["artifact"] is not None:
            _write_card(report, target, folder, licence_files)


def renew_cards(report: Mapping[str, Any], folder: Path) -> None:
    """Write the cards that there are in ``folder`` anew, with the licence files that lie in them.

    Raises:
        MkaError: a file cannot be read or written.
    """
    names = (report["model"].get("licence") or {"files": {}})["files"]
    for target in report["targets"]:
        there = folder / CARDS / target["name"]
        if there.is_dir():
            _write_card(report, target, folder, {name: there / name for name in names})


def _write_card(
    report: Mapping[str, Any], target: Mapping[str, Any], folder: Path, licence_files: Mapping[str, Path]
) -> None:
    final = folder / CARDS / target["name"]
    try:
        with publish_folder(final) as making:
            for name, path in licence_files.items():
                shutil.copyfile(path, making / name)
            (making / CARD).write_text(card(report, target), encoding="utf-8")
            if results := eval_results(report, target):
                (making / RESULTS).mkdir()
                (making / RESULTS / "mmlu.yaml").write_text(results, encoding="utf-8")
    except OSError as error:
        raise MkaError(f"cannot write {final}: {error.strerror or error} ({error.filename or final})") from error


def card(report: Mapping[str, Any], target: Mapping[str, Any]) -> str:
    """Return the README.md of a target that was made: front matter, verdict, figures, provenance, licence."""
    front = _yaml(_front_matter(report, target))
    sections = {
        "What it is": _what(report, target),
        "How good it is": _how_good(report, target),
        "Where it comes from": _provenance(report, target),
        "Licence": _licence(report),
    }
    name = Path(target["artifact"]["path"]).name
    lines = [f"---\n{front}---", "", f"# {escape(name)}", ""]
    for heading, body in sections.items():
        lines += [f"## {heading}", "", *body, ""]
    return "\n".join(lines).rstrip() + "\n"


def eval_results(report: Mapping[str, Any], target: Mapping[str, Any]) -> str | None:
    """Return ``.eval_results/mmlu.yaml``: the artifact's share of right answers in percent; None where none was asked.

    The hub shows it for datasets that it has registered as benchmarks. No ``date``: a report holds none, and the
    hub takes the commit's. No ``verifyToken``: only runs on the hub's own machines have one.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    asked, mmlu = report.get("mmlu"), target.get("mmlu")
    if not asked or not mmlu:
        return None
    accuracy = mmlu["steps"][-1]["accuracy"]
    if accuracy["value"] is None:
        return None
    percents = [round(100 * (accuracy[end] or 0.0), 2) for end in ("value", "low", "high")]
    notes = (
        f"{asked['shots']}-shot, answer letters' logits, {asked['questions']} questions of {asked['subjects']} subjects "
        f"from {_text(questions_source(asked['source']))} (seed {asked['seed']}), 95 % interval {percents[1]} to {percents[2]}, measured in "
        f"{target['runtime']['name']} on {target['runtime']['device']}"
    )
    entry = EvalResultEntry(dataset_id=MMLU[0], task_id=MMLU[1], value=percents[0], notes=notes)
    return _yaml(eval_result_entries_to_yaml([entry]))


def _yaml(data: object) -> str:
    written: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return written


def _public(report: Mapping[str, Any], name: str) -> str:
    """Return a model's name without the folders of this machine: a card is made to be published."""
    return Path(name).name if report["model"]["source"]["kind"] in ("directory", "gguf") else name


def _text(source: str) -> str:
    """Say where a text is from, without the folders of this machine."""
    return Path(source).name if Path(source).is_absolute() or source.startswith(".") else text_source(source)


def _front_matter(report: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
    source, licence = report["model"]["source"], report["model"].get("licence") or {}
    library = LIBRARIES.get(target["runtime"]["name"], "onnx")
    front: dict[str, Any] = {}
    if source["kind"] == "hub":  # the only kind whose name means something to others
        # "merge" is the hub's word for several models made into one: one whose own layers are merged is a derivative.
        front = {"base_model": source["id"], "base_model_relation": "finetune" if report["merge"] else "quantized"}
    for key, field in (("license", "id"), ("license_name", "name"), ("license_link", "link")):
        if licence.get(field):
            front[key] = " ".join(licence[field].split())
    front |= {"pipeline_tag": "text-generation", "library_name": library}
    merged = ["layer-merging"] if report["merge"] else []
    healed = ["distillation"] if report["heal"] else []
    return front | {"tags": ["mka-export", library, *merged, *healed], "quantized_by": "mka-export"}


def _what(report: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    model, merge, heal, artifact = report["model"], report["merge"], report["heal"], target["artifact"]
    yield (
        f"{escape(_public(report, model['name']))} ({model['layers']} layers, {model['parameters'] / 1e6:,.0f} M parameters), made for "
        f"{escape(target['runtime']['name'])} by mka-export {escape(report['tool']['mka-export'])}:"
    )
    yield ""
    if merge:
        yield (
            f"- **Layers merged**: {merge['layers_before']} → {merge['layers_after']} by {escape(merge['method'])}, measure "
            f"{escape(merge['measure'])}" + (f": {spans_text(merge['layers'])}." if merge.get("layers") else ".")
        )
    else:
        yield "- **Layers**: all of them, none merged."
    if heal:
        yield f"- **Healed** by distillation from the original, {len(heal['losses'])} steps."
    details = artifact["details"]
    types = details.get("types") or {}
    stored = ", ".join(f"{count} {escape(name)}" for name, count in types.items())
    bits = details.get("bits_per_weight")
    share = artifact["share_of_original"]
    yield (
        f"- **Stored** in {size(artifact['nbytes'])}"
        + (f", {100 * share:.1f} % of the original" if share is not None else "")
        + (f", {bits:.2f} bits a weight" if bits is not None else "")
        + (f" (tensors: {stored})." if stored else ".")
    )


def _how_good(report: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    judged = any(comparison["checks"] for comparison in target["comparisons"].values()) or target["verdict"] != "pass"
    yield f"Verdict: **{target['verdict']}**. {VERDICTS[target['verdict']] if judged else 'No limit was set.'}"
    yield from ("", *(f"- {escape(reason)}" for reason in reasons(target)))
    yield from (f"- Note: {escape(warning)}" for warning in target["warnings"])
    evaluation = report["evaluation"]
    yield ""
    yield (
        f"Measured in {escape(target['runtime']['name'])} on {escape(target['runtime']['device'] or 'no device')}, on "
        f"{evaluation['windows']} windows of {evaluation['window_tokens']} tokens of "
        f"{escape(_text(evaluation['text']))}. *Compression* is against the original model, *conversion* against the "
        "checkpoint that it was made from. One text and one device do not speak for others."
    )
    yield from ("", *figure_lines(target))


def _provenance(report: Mapping[str, Any], target: Mapping[str, Any]) -> Iterator[str]:
    source = report["model"]["source"]
    at = f" at {code(source['revision'])}" if source.get("revision") else ""
    yield f"- Source: {escape(source['kind'])} {code(_public(report, source['id']))}{at}"
    for name, sha256 in source.get("files", {}).items():
        yield f"  - {code(name)} sha256 {code(sha256)}"
    if report["merge"]:
        calibration = report["merge"]["calibration"]
        yield (
            f"- Calibrated on {calibration['tokens']:,} tokens of {escape(_text(calibration['source']))}, ids' "
            f"sha256 {code(calibration['sha256'])}"
        )
    yield f"- Evaluated on token ids with sha256 {code(report['evaluation']['sha256'])}"
    yield f"- Made with {', '.join(f'{escape(name)} {escape(v)}' for name, v in report['tool'].items())}"
    rows = [[code(f["path"]), size(f["nbytes"]), code(f["sha256"])] for f in target["artifact"]["files"]]
    yield from ("", *table(["file", "size", "sha256"], rows))


def _licence(report: Mapping[str, Any]) -> Iterator[str]:
    licence = report["model"].get("licence") or {"id": None, "name": None, "link": None, "files": {}}
    name = licence["name"] or (licence["id"] if licence["id"] != "other" else "a licence of its makers' own")
    if name:
        link = f", {escape(licence['link'])}" if licence["link"] else ""
        yield f"The original's weights are under {escape(name)}{link}; these are derived from them, and the same holds."
    else:
        yield (
            "**Nothing is known of the licence of the original's weights**: the source names none. Find out what its "
            "makers allow before you publish or use this."
        )
    yield ""
    if licence["files"]:
        yield f"Carried from the source: {', '.join(code(file) for file in licence['files'])}."
    else:
        yield "The source came without a licence, notice or use-policy file, so none lies here."
