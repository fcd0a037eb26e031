"""Two files of results: what is slower beyond noise, by an exit code; and files that say nothing of one another."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import compare
import pytest


def times(median: float, half: float = 0.02) -> dict:
    return {"median": median, "lower": median * (1 - half), "upper": median * (1 + half), "spread": 2 * half}


def record(rows: dict[str, dict], **facts: object) -> dict:
    """{row: {way: milliseconds, or its times}} as a contest's file."""
    found = {
        name: {"milliseconds": {way: t if isinstance(t, dict) else times(t) for way, t in of.items()}}
        for name, of in rows.items()
    }
    return {"kind": "contest", "cpu": "a processor", "cores": 2, "threads": 2, "torch": "2.13", **facts, "rows": found}


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(before: dict, after: dict, *options: str) -> tuple[int, str]:
        files = [tmp_path / "before.json", tmp_path / "after.json"]
        for file, one in zip(files, (before, after), strict=True):
            file.write_text(json.dumps(one))
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, files), *options])
        code = compare.main()
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return run


@pytest.mark.parametrize(
    ("after_ms", "code", "verdict"),
    [(1.0, 0, ""), (1.06, 0, ""), (1.09, 1, "slower"), (0.9, 0, "quicker"), (times(1.3, 0.3), 0, "")],
    ids=["the same", "within noise", "slower", "quicker", "slower but noisy"],
)
def test_slower_is_a_matter_of_quartiles(compared, after_ms, code, verdict):
    found, said = compared(record({"a-F": {"fused": 1.0}}), record({"a-F": {"fused": after_ms}}))
    assert found == code
    lines = [line.split() for line in said.splitlines() if line.startswith("a-F")]
    assert [line[-1] for line in lines] == ([verdict] if verdict else [])


def test_what_others_take_is_said_and_decides_nothing(compared):
    before, after = record({"a-F": {"eager": 1.0, "fused": 1.0}}), record({"a-F": {"eager": 2.0, "fused": 1.0}})
    code, said = compared(before, after)
    assert code == 0
    assert "1 slower, 0 quicker, 1 the same within noise" in said
    assert compared(before, after, "--way", "eager")[0] == 1


def test_the_view_is_that_of_the_rows_ratios(compared):
    before, after = record({"a-F": {"fused": 1.0}}), record({"a-F": {"fused": 9.0}})
    for one, ms in ((before, 1.0), (after, 1.01)):
        one["rows"]["a-F"] |= {"headline": "cold", "device_milliseconds": {"cold": {"fused": times(ms)}}}
    assert compared(before, after)[0] == 0


def test_rows_that_one_lacks_are_listed(compared):
    code, said = compared(
        record({"a-F": {"fused": 1.0}, "b-F": {"fused": 1.0}}), record({"a-F": {"fused": 1.0}, "c-F": {"fused": 1.0}})
    )
    assert code == 0
    assert "only before: b-F" in said
    assert "only after: c-F" in said


def test_other_machines_are_compared_where_that_is_wanted(compared):
    before, after = record({"a-F": {"fused": 1.0}}), record({"a-F": {"fused": 2.0}}, cpu="another", torch="2.14")
    code, said = compared(before, after)
    assert code == 2
    assert "cpu: a processor, another" in said
    code, said = compared(before, after, "--any-machine")
    assert code == 1
    assert "torch: 2.13, then 2.14" in said


@pytest.mark.parametrize(
    ("after", "why"),
    [
        (record({"a-F": {"fused": 1.0}}, kind="memory"), "of one kind, contest or sweep, got contest and memory"),
        (record({"b-F": {"fused": 1.0}}), "no row and way in common"),
        (record({"a-F": {"stacked": 1.0}}), "no row and way in common"),
    ],
    ids=["another kind", "other rows", "other ways"],
)
def test_what_cannot_be_compared_says_why(compared, after, why):
    code, said = compared(record({"a-F": {"fused": 1.0}}), after)
    assert code == 2
    assert why in said


def test_a_file_that_is_none_cannot_be_compared(tmp_path, monkeypatch, capsys):
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    for file in (broken, tmp_path / "nowhere.json"):
        monkeypatch.setattr(sys, "argv", ["compare.py", str(file), str(file)])
        assert compare.main() == 2
        assert "cannot be compared" in capsys.readouterr().err
