from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from full_report import enrich
from huggingface_hub import ModelCard, parse_eval_result_entries

from mka_export.errors import MkaError
from mka_export.report import renew_cards, valid_report, write_cards
from mka_export.report.card import card, eval_results


def front(report: dict[str, Any], target: dict[str, Any]) -> dict[str, Any]:
    return dict(ModelCard(card(report, target)).data.to_dict())


def test_front_matter_of_a_hub_model(report: dict[str, Any], target: dict[str, Any]) -> None:
    report["model"]["source"] = {"kind": "hub", "id": "org/Model", "revision": "c" * 40}
    report["model"]["licence"] = {"id": "other", "name": "Org's own", "link": "LICENSE", "files": {}}
    found = front(report, target)
    assert found["base_model"] == "org/Model"
    assert found["base_model_relation"] == "finetune"
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "Org's own", "LICENSE")
    assert (found["library_name"], found["pipeline_tag"]) == ("gguf", "text-generation")
    assert {"mka-export", "gguf", "layer-merging"} <= set(found["tags"])
    report["merge"] = None
    assert front(report, target)["base_model_relation"] == "quantized"
    target["runtime"]["name"] = "onnxruntime"
    assert front(report, target)["library_name"] == "onnx"


def test_a_model_that_is_on_no_hub_names_no_base(report: dict[str, Any], target: dict[str, Any]) -> None:
    assert "base_model" not in front(report, target)


def test_names_cannot_leave_the_front_matter(report: dict[str, Any], target: dict[str, Any]) -> None:
    name = "x\n---\nlicense: mit\n# <script>"
    report["model"] |= {"licence": {"id": "other", "name": name, "link": None, "files": {}}}
    assert front(report, target)["license_name"] == " ".join(name.split())
    assert card(report, target).splitlines().count("---") == 2
    assert "<script>" not in card(report, target).split("\n---\n", 1)[1]


@pytest.mark.parametrize(
    ("verdict", "words"), [("pass", "keeps every limit"), ("fail", "breaks a limit"), ("inconclusive", "Too little")]
)
def test_the_verdict_is_told_as_it_is(report: dict[str, Any], target: dict[str, Any], verdict: str, words: str) -> None:
    target["verdict"] = verdict
    target["comparisons"]["compression"]["checks"][0] |= {"verdict": verdict, "reason": "a reason"}
    text = card(report, target)
    assert f"Verdict: **{verdict}**" in text
    assert words in text
    assert ("- a reason" in text) == (verdict != "pass")
    assert "1.260 (1.220 to 1.310)" in text
    assert target["artifact"]["files"][0]["sha256"] in text


def test_without_limits_nothing_is_said_to_be_kept(report: dict[str, Any], target: dict[str, Any]) -> None:
    for comparison in target["comparisons"].values():
        comparison |= {"checks": [], "limits": {}}
    assert "No limit was set" in card(report, target)


def test_folders_of_this_machine_are_not_published(report: dict[str, Any], target: dict[str, Any]) -> None:
    report["model"] |= {"name": "/home/a/model", "source": {"kind": "directory", "id": "/home/a/model"}}
    report["evaluation"]["text"] = "/home/a/text.txt"
    target["artifact"]["path"] = "/home/a/out/gguf-q4/model.gguf"
    assert "/home" not in card(report, target)


def test_results_are_in_the_hub_s_format(report: dict[str, Any]) -> None:
    report = enrich(report)
    (entry,) = parse_eval_result_entries(yaml.safe_load(str(eval_results(report, report["targets"][0]))))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("cais/mmlu", "mmlu", 37.8)
    assert "5-shot" in str(entry.notes)
    assert "34.9 to 40.7" in str(entry.notes)


def test_cards_are_written_with_the_licence_files(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("do as you like")
    (tmp_path / "USE_POLICY.md").write_text("but no harm")
    report["model"]["licence"] = {
        "id": None,
        "name": None,
        "link": None,
        "files": {"LICENSE": "a" * 64, "USE_POLICY.md": "b" * 64},
    }
    failed = dict(report["targets"][0], name="gguf-q3", artifact=None)
    report["targets"].append(failed)
    write_cards(valid_report(report), tmp_path, {n: tmp_path / n for n in ("LICENSE", "USE_POLICY.md")})
    assert [p.name for p in (tmp_path / "card").iterdir()] == ["gguf-q4"]
    folder = tmp_path / "card" / "gguf-q4"
    assert {p.name for p in folder.iterdir()} == {"README.md", "LICENSE", "USE_POLICY.md"}  # no MMLU: no results
    assert (folder / "USE_POLICY.md").read_text() == "but no harm"
    text = (folder / "README.md").read_text()
    assert "Nothing is known of the licence" in text
    assert "<code>USE&#95;POLICY.md</code>" in text


def test_results_lie_where_the_hub_looks(report: dict[str, Any], tmp_path: Path) -> None:
    write_cards(enrich(report), tmp_path, {})
    data = yaml.safe_load((tmp_path / "card" / "gguf-q4" / ".eval_results" / "mmlu.yaml").read_text())
    assert data[0]["dataset"]["id"] == "cais/mmlu"
    assert "none lies here" not in (tmp_path / "card" / "gguf-q4" / "README.md").read_text()


def test_cards_are_renewed_with_what_lies_in_them(report: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "LICENSE").write_text("do as you like")
    report["model"]["licence"] = {"id": "mit", "name": None, "link": None, "files": {"LICENSE": "a" * 64}}
    renew_cards(report, tmp_path)
    assert not (tmp_path / "card").exists()
    write_cards(report, tmp_path, {"LICENSE": tmp_path / "LICENSE"})
    (tmp_path / "LICENSE").unlink()
    report["targets"][0]["verdict"] = "fail"
    renew_cards(report, tmp_path)
    folder = tmp_path / "card" / "gguf-q4"
    assert "Verdict: **fail**" in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == "do as you like"


def test_a_licence_that_is_gone_leaves_no_half_card(report: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(MkaError, match="cannot write .*gguf-q4: No such file"):
        write_cards(report, tmp_path, {"LICENSE": tmp_path / "LICENSE"})
    assert list((tmp_path / "card").iterdir()) == []
