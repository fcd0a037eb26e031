"""What a study has to say: claims of a write-up, what was measured, whether they hold; data and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..gradients import picture, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Finding(NamedTuple):
    """One claim of the write-up, and what was measured of it, in figures."""

    claim: str
    measured: str
    holds: bool


@dataclass
class Report:
    """A study's outcome. `data` is what JSON can say, `figures` are by the end of their files' names ("" for one)."""

    name: str
    question: str
    table: str
    findings: list[Finding]
    data: dict[str, Any]
    figures: Mapping[str, Figure] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return all(finding.holds for finding in self.findings)

    def text(self) -> str:
        """The table, then every claim with what was measured and whether it holds."""
        lines = [self.question, "", self.table, ""]
        for claim, measured, holds in self.findings:
            lines += [f"{'holds' if holds else 'DOES NOT HOLD'}: {claim}", f"    measured: {measured}"]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the pictures; what is not finite becomes null, for JSON knows no infinity."""
        findings = [finding._asdict() for finding in self.findings]
        facts = {"study": self.name, "question": self.question, "torch": torch.__version__, "holds": self.holds}
        return table.finite(facts | {"findings": findings} | self.data)

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
