"""Pages that are made from something else are as it is now."""

from __future__ import annotations

from pico import REPOSITORY


def test_the_list_of_faults_is_up_to_date(capsys, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "tests" / "faults")
    import listing

    listing.main()
    page = (REPOSITORY / "docs" / "faults.md").read_text(encoding="utf-8")
    assert capsys.readouterr().out == page, "python tests/faults/listing.py > docs/faults.md"
