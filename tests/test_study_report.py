"""What all studies share: reports that fail where a finding is unexpected, numbers that are not finite, facts."""

from __future__ import annotations

import json
from math import inf, isnan, nan

import pytest
import torch

from fusedres.studies import machine, reading
from fusedres.studies.report import Finding, Report


def report(*findings):
    return Report("gate", "What does a gate do?", "a table", list(findings), {})


@pytest.mark.parametrize(
    ("holds", "expected", "said"),
    [
        (True, True, "holds"),
        (False, True, "DOES NOT HOLD"),
        (False, False, "does not hold, as is known"),
        (True, False, "HOLDS, which is known not to"),
    ],
)
def test_a_report_holds_where_findings_are_as_expected(holds, expected, said):
    found = report(Finding("it opens", "0.5", True), Finding("it shuts", "0.1", holds, expected))
    assert found.holds == (holds == expected)
    assert f"\nholds: it opens\n    measured: 0.5\n{said}: it shuts\n    measured: 0.1\n" in found.text()
    data = json.loads(json.dumps(found.to_dict()))
    assert data["holds"] == (holds == expected)
    assert data["findings"][1] == {"claim": "it shuts", "measured": "0.1", "holds": holds, "expected": expected}
    assert data["summary"] == found.summary


def test_one_line_sums_up():
    known, new = Finding("b", "", False, expected=False), Finding("c", "", False)
    assert report(Finding("a", "", True)).summary == (
        "1 of 1 claims hold, 0 do not, of which 0 known not to; none came out other than expected"
    )
    assert report(Finding("a", "", True), known, new).text().splitlines()[-1] == (
        "1 of 3 claims hold, 2 do not, of which 1 known not to; 1 came out other than expected"
    )


def test_the_worst_is_not_a_number_where_any_is():
    assert (reading.worst([1.0, 3.0, -4.0]), reading.least([1.0, 3.0, -4.0])) == (3.0, -4.0)
    assert (reading.worst([1.0, inf]), reading.least([1.0, -inf])) == (inf, -inf)
    for values in ([nan, 1.0, 2.0], [1.0, nan, 2.0], [1.0, 2.0, nan]):
        assert isnan(reading.worst(values))
        assert isnan(reading.least(values))
        assert all(map(isnan, reading.quartiles(values)))
    assert reading.quartiles([-inf, 1.0, 2.0, 3.0, inf]) == (1.0, 2.0, 3.0)
    assert (reading.spread([2.0, 1.0]), reading.spread([1.0, 1.0])) == ("1 to 2", "1")


@pytest.mark.parametrize("value", [nan, inf, -inf])
def test_what_is_not_finite_fails(value):
    assert reading.all_finite("gradients", [1.0, 0.0]).holds
    found = reading.all_finite("gradients", [1.0, value])
    assert not found.holds
    assert found.measured == "1 of 2 are not"
    assert not reading.all_finite("gradients", []).holds, "nothing was recorded"


def test_a_report_names_machine_versions_commit_and_date(tmp_path):
    report(Finding("it opens", "0.5", True)).write(tmp_path)
    found = json.loads((tmp_path / "gate.json").read_text())["machine"]
    assert found["torch"] == torch.__version__
    assert all(found[name] for name in ("cpu", "gpu", "os", "python", "commit", "date", "cores"))


def test_the_commit_is_this_tree_s(monkeypatch, tmp_path):
    """Not that of another project's tree, into which the package was installed."""
    assert machine.said(["no-such-command"]) == ""
    inside = tmp_path / "site-packages" / "machine.py"
    inside.parent.mkdir()
    inside.touch()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a"]
    if not machine.said([*git, "init"]):
        pytest.skip("there is no git")
    machine.said([*git, "commit", "--allow-empty", "-m", "another project"])
    monkeypatch.setattr(machine, "__file__", str(inside))
    monkeypatch.delenv("COMMIT", raising=False)
    assert machine.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc")
    assert machine.commit() == "abc"
    machine.said([*git, "add", "."])
    machine.said([*git, "commit", "-m", "now it is its own"])
    assert machine.commit() == machine.said([*git, "rev-parse", "HEAD"])
