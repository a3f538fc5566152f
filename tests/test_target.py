"""Target files that are wrong: told in one line with the file's name, before any work."""

from __future__ import annotations

from pathlib import Path

import pytest

from mka_export.errors import ConversionError, UsageError
from mka_export.needs import Need
from mka_export.target import Budget, Limits, load_target, target_names

SOUND = 'description = "x"\nconverter = "gguf"\nprecision = "q8_0"\nruntime = "llama.cpp"\n'


def test_all_fields(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        SOUND + 'activations = true\nfamilies = ["llama"]\n[compression]\nmin_top1 = 1\n[options]\na = [1]\n'
        '[budget]\nmemory = "1.5 GB"\ncontext = 2048\n'
    )
    target = load_target(str(path))
    assert (target.name, target.activations, target.families) == ("mine", True, ("llama",))
    assert (target.conversion, target.compression) == (Limits(), Limits(min_top1=1.0))
    assert target.options == {"a": [1]}
    assert target.budget == Budget(memory=1_500_000_000, context=2048)


def test_an_artifact_larger_than_the_devices_memory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "phone.toml"
    path.write_text(SOUND + '[budget]\nmemory = "3 GB"\ncontext = 1000\n')
    target = load_target(str(path))
    target.require_budget(Need(kept=2_900_000_000, cache=100_000))
    with pytest.raises(
        ConversionError, match=r"3\.00 GB for a model; this one may take 3\.01 GB, 110\.0 MB of it for 1,000"
    ):
        target.require_budget(Need(kept=2_900_000_000, cache=110_000))
    (tmp_path / "any.toml").write_text(SOUND)
    load_target(str(tmp_path / "any.toml")).require_budget(Need(kept=10**15))


@pytest.mark.parametrize("name", target_names())
def test_shipped_targets(name: str) -> None:
    assert load_target(name).name == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SOUND.replace('"x"', "3"), "description = 3 is not a text"),
        (SOUND.replace('runtime = "llama.cpp"', ""), "runtime is missing"),
        (SOUND.replace("runtime", "runtimes"), "unknown field 'runtimes': did you mean runtime"),
        (SOUND + 'name = "x"', "unknown field 'name'"),
        (SOUND + 'activations = "no"', "activations = 'no' is not true or false"),
        (SOUND + 'families = "llama"', "families = 'llama' is not a list"),
        (SOUND + "families = [3]", r"families = \[3\] are not names"),
        (SOUND + "options = 3", "options = 3 is not a table"),
        (SOUND + 'conversion = "x"', "conversion = 'x' is not a table"),
        (SOUND + "[conversion]\nmax_ppl = 2", "unknown limit 'max_ppl': did you mean max_ppl_ratio"),
        (SOUND + '[conversion]\nmax_ppl_ratio = "2"', "max_ppl_ratio = '2' is not a number"),
        (SOUND + "[compression]\nmax_mean_kl = -1", "max_mean_kl = -1.0 cannot be"),
        (SOUND + "[compression]\nmin_top1 = 2", "min_top1 = 2.0 cannot be"),
        (SOUND + "[budget]\ncontext = 10", "memory is missing"),
        (SOUND + '[budget]\nmemory = "2 XB"\ncontext = 10', "'2 XB' is no size, as 800MB or 1.5GB are"),
        (SOUND + '[budget]\nmemory = "2 GB"\ncontext = 0', "context = 0 cannot be"),
        (SOUND + '[budget]\nmemory = "2 GB"\ncontexts = 1', "unknown field of budget 'contexts': did you mean context"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load_target(str(tmp_path / "mine.toml"))
    assert "mine.toml" in str(caught.value)


def test_a_hidden_file_would_make_a_hidden_stage(tmp_path: Path) -> None:
    (tmp_path / "..toml").write_text(SOUND)
    with pytest.raises(UsageError, match="cannot be called '.'"):
        load_target(str(tmp_path / "..toml"))
