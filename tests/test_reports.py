"""``mka-export report``: reports written anew, and the shards of one check joined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import type_in
from mmlu_data import write_mmlu

from mka_export.parity.metrics import Scores
from mka_export.pipeline import measuring
from mka_export.pipeline.measured import Measured

SMALL = ["--windows", "8", "--window-tokens", "64", "--device", "cpu", "--quiet"]
ASKED = ["--mmlu-questions", "40", "--mmlu-shots", "1"]
LIMITS = ["--max-ppl-ratio", "1.5", "--max-mean-kl", "0.01", "--min-top1", "0.5"]
SHARDS = 3


@pytest.fixture(scope="module")
def folder(pico_llama, tmp_path_factory) -> Path:
    """Where a model and a file made from it lie."""
    folder = tmp_path_factory.mktemp("reports")
    shutil.copytree(pico_llama, folder / "pico")
    subjects = ("anatomy", "astronomy", "college_physics", "philosophy", "sociology", "virology", "world_religions")
    write_mmlu(folder / "mmlu", dict.fromkeys(subjects, 7))
    convert = ["convert", folder / "pico", "--to", "gguf-q8", "--out", folder / "made", *SMALL, "--max-ppl-ratio", "9"]
    assert type_in(*convert).exit_code in (0, 3)
    (gguf,) = (folder / "made" / "gguf-q8").glob("*.gguf")
    shutil.copy(gguf, folder / "pico-q8.gguf")
    return folder


def check(folder: Path, out: Path, *more: object) -> dict[str, Any]:
    check = ["check", folder / "pico-q8.gguf", "--against", folder / "pico", "--out", out, *SMALL, *LIMITS]
    result = type_in(*check, "--mmlu", folder / "mmlu", *ASKED, *more, "--json")
    assert result.exit_code in (0, 3, 4), result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def whole(folder) -> dict[str, Any]:
    return check(folder, folder / "whole")


@pytest.fixture(scope="module")
def shards(folder) -> list[Path]:
    """The folders of all shards, the last one first."""
    outs = [folder / f"shard-{index}" for index in range(SHARDS, 0, -1)]
    for out in outs:
        check(folder, out, "--shard", f"{out.name[-1]}/{SHARDS}")
    return outs


def figures(report: dict[str, Any]) -> dict[str, Any]:
    """Return what must not depend on how the work was divided: all but times and memory."""
    targets = [{key: value for key, value in entry.items() if key != "speed"} for entry in report["targets"]]
    return {key: report[key] for key in ("model", "evaluation", "mmlu", "shard", "warnings")} | {"targets": targets}


def test_shards_together_say_what_one_piece_says(whole, shards, tmp_path):
    out = tmp_path / "joined"
    result = type_in("report", "--merge", *shards, "--out", out, "--json")
    assert result.exit_code == {"pass": 0, "fail": 3, "inconclusive": 4}[whole["targets"][0]["verdict"]]
    joined = json.loads(result.stdout)
    assert figures(joined) == figures(whole)
    assert joined == json.loads((out / "report.json").read_text())
    assert joined["targets"][0]["speed"]["prompt"] > 0
    assert joined["targets"][0]["mmlu"]["comparisons"]["compression"]["questions"] == 40
    assert type_in("verify", out, "--quiet").exit_code == 0


def test_a_shard_measures_its_part_and_says_so(whole, shards):
    one = json.loads((shards[-1] / "report.json").read_text())
    assert one["shard"] == {"index": 1, "count": 3}
    assert one["evaluation"] == whole["evaluation"]
    assert one["targets"][0]["comparisons"]["compression"]["tokens"] == 3 * 63  # windows 0, 3 and 6 of 8
    assert one["targets"][0]["verdict"] == "inconclusive"  # three windows are too few for an interval
    assert [group["name"] for group in one["targets"][0]["mmlu"]["subjects"]] == [
        "anatomy",
        "philosophy",
        "world_religions",
    ]
    parts = [np.load(out / "parity" / "pico-q8" / "scores.npz")["nll/artifact"] for out in reversed(shards)]
    expected = np.load(shards[0].parent / "whole" / "parity" / "pico-q8" / "scores.npz")["nll/artifact"]
    for index, part in enumerate(parts):
        np.testing.assert_array_equal(part, expected[index::SHARDS])


def test_a_shard_is_measured_once(folder, shards, monkeypatch):
    monkeypatch.setattr(measuring, "score", None)
    again = check(folder, shards[0], "--shard", "3/3")
    assert all(stage["reused"] for stage in again["stages"])


def altered(shard: Path, to: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(shard, to)
    report = json.loads((to / "report.json").read_text())
    change(report)
    (to / "report.json").write_text(json.dumps(report))
    return to


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", "of 3 shards these are missing: 1"),
        ("twice", "shard 3/3 is in"),
        ("whole", "is no shard: all was measured there"),
        ("other count", "these are shards of 3 and of 4"),
        ("other windows", "is of another check than"),
        ("other questions", "these differ: seed of the questions, sha256 of the questions"),
        ("damaged", "scores.npz is not as it was made"),
        ("nothing", "holds no report.json"),
        ("no report", "is no report of this mka-export"),
        ("no out", "--merge needs a folder"),
        ("out is one", "holds one of the shards"),
    ],
)
def test_what_does_not_belong_together_is_one_line(fault, words, folder, shards, whole, tmp_path):
    three, two, one = shards
    out = ["--out", tmp_path / "out"]
    given: list[object] = [three, two, one, *out]
    if fault == "missing":
        given = [three, two, *out]
    elif fault == "twice":
        given = [three, two, one, shutil.copytree(three, tmp_path / "copy"), *out]
    elif fault == "whole":
        given = [three, two, folder / "whole", *out]
    elif fault == "other count":
        given = [three, two, altered(one, tmp_path / "one", lambda r: r["shard"].update(count=4)), *out]
    elif fault == "other windows":
        other = tmp_path / "other"
        check(folder, other, "--shard", "1/3", "--windows", "9")
        given = [three, two, other, *out]
    elif fault == "other questions":
        other = tmp_path / "other"
        check(folder, other, "--shard", "1/3", "--mmlu-seed", "9")
        given = [three, two, other, *out]
    elif fault == "damaged":
        other = Path(shutil.copytree(one, tmp_path / "one"))
        (other / "parity" / "pico-q8" / "scores.npz").write_bytes(b"")
        given = [three, two, other, *out]
    elif fault == "nothing":
        given = [three, two, tmp_path / "absent", *out]
    elif fault == "no report":
        given = [three, two, altered(one, tmp_path / "one", lambda r: r.pop("targets")), *out]
    elif fault == "no out":
        given = [three, two, one]
    else:
        given = [three, two, one, "--out", one]
    result = type_in("report", "--merge", *given)
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("shard", ["0/3", "4/3", "3", "1/0", "-1/3", "9/9"])
def test_a_shard_that_cannot_be(shard, folder, tmp_path):
    run = ["check", folder / "pico-q8.gguf", "--against", folder / "pico", "--shard", shard, "--out", tmp_path / "out"]
    result = type_in(*run, *SMALL)
    assert result.exit_code == 2
    assert ("there are only 8 windows" if shard == "9/9" else "is no part of several") in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_shard_whose_runtime_failed_fails_all(shards):
    measured = [Measured.read(out / "parity" / "pico-q8") for out in reversed(shards)]
    failed = Measured({**measured[1].facts, "failures": ["it crashed"], "samples": [], "speed": None}, None)
    joined = Measured.join([measured[0], failed, measured[2]])
    assert joined.comparison is None
    assert joined.facts["failures"] == ["it crashed"]
    assert (joined.facts["samples"], joined.facts["speed"]) == ([], None)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_what_was_dealt_out_is_woven_together(count):
    items = np.arange(7.0)[:, None]
    parts = [Scores({"original": items[index::count]}, {}) for index in range(count)]
    assert Scores.join(parts).nll["original"].tolist() == items.tolist()


def test_a_report_is_written_anew_from_what_was_measured(folder, whole, tmp_path):
    out = Path(shutil.copytree(folder / "whole", tmp_path / "out"))

    def spoil(report: dict[str, Any]) -> None:
        entry = report["targets"][0]
        entry |= {"verdict": "pass", "steps": [], "profile": None, "attribution": []}
        entry["comparisons"]["compression"]["kl"]["mean"] = 0.0

    spoilt = altered(out, tmp_path / "spoilt", spoil)
    result = type_in("report", spoilt, "--json", "--quiet")
    assert json.loads(result.stdout) == whole == json.loads((spoilt / "report.json").read_text())
    assert type_in("verify", spoilt, "--quiet").exit_code == 0
    manifests = [json.loads((each / "manifest.json").read_text()) for each in (spoilt, folder / "whole")]
    assert manifests[0] == manifests[1]
    for arguments in ([spoilt, out], [spoilt, "--out", tmp_path / "else"]):
        refused = type_in("report", *arguments)
        assert refused.exit_code == 2
        assert "are for --merge" in refused.stderr


def test_a_report_of_several_targets_is_written_anew(folder, tmp_path):
    out = Path(shutil.copytree(folder / "made", tmp_path / "out"))
    before = (out / "report.json").read_text()
    assert type_in("report", out, "--quiet").exit_code in (0, 3, 4)
    assert (out / "report.json").read_text() == before
