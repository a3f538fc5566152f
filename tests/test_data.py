"""JSON and TOML that nobody vouches for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mka_export import data
from mka_export.data import load_json, read_toml, value_of
from mka_export.errors import MkaError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "no JSON object"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "it has 'c' twice"),
        ('{"a": NaN}', "nan is beyond"),
        ('{"a": [-1e400]}', "-inf is beyond"),
        ('{"a": 18446744073709551616}', "18446744073709551616 is beyond"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ('{"\\ud800": 1}', "surrogates not allowed"),
        ('{"a": ' + "[" * 32 + "]" * 32 + "}", "more than 32 deep"),
        ("[" * 100_000, "recursion"),
        ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
        ('{"a": "' + "x" * 200 + '"}', "larger than 150 bytes"),
    ],
)
def test_json_that_no_file_of_ours_holds(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if message.startswith("larger"):
        monkeypatch.setattr(data, "MAX_JSON", 150)
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_json(tmp_path / "x.json")


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = {"a": [1, -2.5, None, True, "ünï\n"], "b": {"c": (1 << 64) - 1, "d": {}}}
    (tmp_path / "x.json").write_text(json.dumps(written))
    assert load_json(tmp_path / "x.json") == written


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = nan", "nan is beyond"),
        ("a = 2020-01-01", "2020-01-01 is beyond"),
        ("a = " + "[" * 5000, "recursion"),
        ("a = " + "9" * 5000, "4300 digits"),
        ("a." * 40 + "a = 1", "more than 32 deep"),
        ("a = 1\n" * 5000, "larger than 16384 bytes"),
        ("a", "not valid TOML"),
    ],
)
def test_toml_that_no_file_of_ours_holds(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text(text)
    with pytest.raises(MkaError, match=message) as caught:
        read_toml(tmp_path / "x.toml")
    assert "x.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (True, int, "a = True is not a whole number"),
        (1.0, int, "a = 1.0 is not a whole number"),
        (True, float, "a = True is not a number"),
        ("1", float, "a = '1' is not a number"),
        (1, bool, "a = 1 is not true or false"),
        (None, str, "a = None is not a text"),
        ("x", list, "a = 'x' is not a list"),
        ([], dict, r"a = \[\] is not a table"),
    ],
)
def test_a_value_of_another_kind_is_named(value: Any, kind: type, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        value_of({"a": value}, "a", kind)
    with pytest.raises(ValueError, match="b is missing"):
        value_of({"a": value}, "b", kind)


def test_a_whole_number_will_do_for_a_float() -> None:
    assert value_of({"a": 2}, "a", float) == 2.0
    assert type(value_of({"a": 2}, "a", float)) is float
