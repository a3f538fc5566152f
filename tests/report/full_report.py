"""A report with every section: invented figures, of the shape and size of real ones."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

SUBJECTS = {
    "STEM": "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
    "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
NO_FIGURES: dict[str, Any] = {  # of a target whose runtime failed
    "steps": [],
    "comparisons": {},
    "attribution": [],
    "profile": None,
    "speed": None,
    "smoke": None,
    "samples": [],
}
EDGES = [10 ** (i / 2 - 4) for i in range(11)]


def interval(value: float, half: float) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def enrich(report: dict[str, Any]) -> dict[str, Any]:
    """Return ``report`` with all that it may hold besides."""
    report, rng = copy.deepcopy(report), random.Random(0)
    groups = [_group(name, kind, 20, rng) for kind, names in SUBJECTS.items() for name in names.split()]
    asked = 20 * len(groups)
    report["mmlu"] = {
        "source": "hub",
        "sha256": "cd" * 32,
        "questions": asked,
        "subjects": 57,
        "shots": 5,
        "seed": 7,
    }
    report["heal"] = {
        **{"method": "distill", "steps": 240, "batch": 2, "rate": 5e-5, "train": "all"},
        "calibration": {"source": "embedded", "sha256": "ef" * 32, "tokens": 131_072},
        "losses": [0.25 + 0.5 * math.exp(-i / 40) + 0.06 * rng.random() for i in range(180)],
        "held_out": [{"step": s, "kl": 0.3 + 0.35 * math.exp(-s / 50)} for s in range(0, 181, 20)],
        **{"best": 160, "seconds": 812.0},
    }
    report["merge"]["depth"] = {
        "limit": "a perplexity ratio of at most 1.35",
        "limited_by": "with 26 it is 1.41 (1.33 to 1.49), in torch",
        "tried": [
            {"layers": n, "ppl_ratio": interval(ratio, 0.06 * ratio), "runtime": "torch"}
            for n, ratio in ((24, 1.9), (26, 1.41), (27, 1.2), (28, 1.12))
        ],
    }
    report["merge"]["similarity"] = _similarity(report["merge"])
    report["model"].setdefault(
        "licence", {"id": "apache-2.0", "name": None, "link": None, "files": {"LICENSE": "12" * 32}}
    )
    for target in report["targets"]:
        _enrich_target(target, groups, rng)
    return report


def _enrich_target(target: dict[str, Any], groups: list[dict[str, Any]], rng: random.Random) -> None:
    names = ["original", "merged", "healed", "quantized", "artifact"]
    letters = {"A": 300, "B": 360, "C": 250, "D": 230}
    target["mmlu"] = {
        "steps": [
            {
                **{"name": name, "runtime": "torch" if name != "artifact" else "llama.cpp", "device": "cpu"},
                **{"accuracy": interval(share, 0.029), "letters": letters, "at_chance": False},
            }
            for name, share in zip(names, (0.412, 0.381, 0.391, 0.379, 0.378), strict=True)
        ],
        "comparisons": {
            "conversion": _asked("healed", -0.013, 21, 36, 0.03),
            "compression": _asked("original", -0.034, 51, 90, 0.05),
        },
        "categories": [
            _group(kind, kind, sum(g["questions"] for g in groups if g["category"] == kind), rng) for kind in SUBJECTS
        ],
        "subjects": groups,
    }
    target["attribution"] = [
        {"metric": metric, "steps": [_change(*each) for each in zip(names[1:], names, changes, strict=False)]}
        for metric, changes in (
            ("ln_ppl", ((0.22, 0.03), (-0.05, 0.012), (0.034, 0.008), (-0.0021, 0.001))),
            ("mmlu", ((-0.031, 0.02), (0.01, 0.014), (-0.012, 0.011), (-0.001, 0.004))),
        )
    ]
    target["profile"] = {
        "position": [
            {
                **{"first": first, "last": first + 31},
                "perplexity": {
                    n: base * (1 + 4 * math.exp(-first / 40))
                    for n, base in zip(names, (18, 23, 21.5, 22, 22), strict=True)
                },
            }
            for first in range(1, 256, 32)
        ],
        "kl_histogram": {
            "edges": EDGES,
            "counts": {
                kind: [int(900 * math.exp(-(((i - middle) / 2) ** 2))) for i in range(len(EDGES) + 1)]
                for kind, middle in (("conversion", 4.5), ("compression", 6.8))
            },
        },
    }
    target["speed"] = {"prompt": 412.7, "generated": 38.2}
    check = {"name": "chat_template", "verdict": "pass", "reason": "the same 42 ids as the original's tokenizer"}
    target["smoke"] = {
        "verdict": "pass",
        "checks": [
            check,
            check | {"name": "end_of_text", "reason": "Smoke: it stops after 23 tokens, the original after 19"},
            check
            | {"name": "repetition", "reason": "Smoke: 0.11 of its runs of tokens repeat, of the original's 0.08"},
        ],
        "repetition": {"original": 0.08, "artifact": 0.11},
    }


def _asked(against: str, change: float, gained: int, lost: int, margin: float) -> dict[str, Any]:
    return {
        **{"against": against, "questions": 1140, "change": interval(change, 0.02), "gained": gained, "lost": lost},
        **{"same_answer": 0.83, "p": 0.0012, "smallest_seen": 0.031, "margin": margin},
        **{"questions_for_margin": 620, "informative": True},
    }


def _change(name: str, against: str, change: tuple[float, float]) -> dict[str, Any]:
    return {"name": name, "against": against, "change": interval(*change)}


def _group(name: str, category: str, questions: int, rng: random.Random) -> dict[str, Any]:
    right = rng.uniform(0.25, 0.6)
    left = max(0.05, right - rng.uniform(-0.08, 0.14))
    half = 0.98 / math.sqrt(questions)
    sure = name == "high_school_geography"
    return {
        **{"name": name, "category": category, "questions": questions},
        "original": {"value": right, "low": max(0.0, right - half), "high": min(1.0, right + half)},
        "artifact": {"value": left, "low": max(0.0, left - half), "high": min(1.0, left + half)},
        **{"gained": 1, "lost": 9 if sure else 3, "p": 0.0006 if sure else 0.4, "q": 0.034 if sure else 0.8},
    }


def _similarity(merge: dict[str, Any]) -> dict[str, Any]:
    def matrix(size: int) -> list[list[float]]:
        return [[math.exp(-abs(i - j) / 9) for j in range(size)] for i in range(size)]

    return {"before": matrix(merge["layers_before"]), "after": matrix(merge["layers_after"])}
