"""What a study has to say: claims of a write-up, what was measured, whether they hold; data and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..gradients import picture, table
from . import machine

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Finding(NamedTuple):
    """One claim, of the write-up unless it says otherwise, and what was measured of it, in figures.

    expected: what this project has found before of the study as it is by default, and states.
    """

    claim: str
    measured: str
    holds: bool
    expected: bool = True

    @property
    def verdict(self) -> str:
        """Capitals where it is another than expected."""
        if self.expected:
            return "holds" if self.holds else "DOES NOT HOLD"
        return "HOLDS, which is known not to" if self.holds else "does not hold, as is known"


@dataclass
class Report:
    """A study's outcome. `data` is what JSON can say, `figures` are by the end of their files' names ("" for one)."""

    name: str
    question: str
    table: str
    findings: list[Finding]
    data: dict[str, Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=machine.facts)

    @property
    def holds(self) -> bool:
        """Whether every finding came out as expected: a claim that is known not to hold must not."""
        return all(finding.holds == finding.expected for finding in self.findings)

    def text(self) -> str:
        """The table, then every claim with what was measured and whether it holds, then how many do."""
        lines = [self.question, "", self.table, ""]
        for finding in self.findings:
            lines += [f"{finding.verdict}: {finding.claim}", f"    measured: {finding.measured}"]
        return "\n".join([*lines, self.summary])

    @property
    def summary(self) -> str:
        """How many claims hold, how many do not, and of how many that was known."""
        failed = [finding for finding in self.findings if not finding.holds]
        known = sum(not finding.expected for finding in failed)
        surprises = sum(finding.holds != finding.expected for finding in self.findings)
        return (
            f"{len(self.findings) - len(failed)} of {len(self.findings)} claims hold, {len(failed)} do not, of which "
            f"{known} known not to; {surprises or 'none'} came out other than expected"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures; what is not finite becomes null, for JSON knows no infinity."""
        findings = [finding._asdict() for finding in self.findings]
        facts = {"study": self.name, "question": self.question, "holds": self.holds, "summary": self.summary}
        return table.finite(facts | {"machine": self.machine, "findings": findings} | self.data)

    def write(self, folder: Path) -> list[Path]:
        """NAME.json and the pictures, NAME.png or NAME-….png; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{self.name}.json"]
        paths[0].write_text(json.dumps(self.to_dict()) + "\n")
        for ending, figure in self.figures.items():
            paths.append(folder / f"{self.name}{'-' if ending else ''}{ending}.png")
            picture.save(figure, paths[-1])
        return paths


def require(*packages: str) -> None:
    """ImportError, in one line, where a package that a study needs is missing."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ImportError(f"the study needs {', '.join(missing)}: pip install fusedres[demo]")
