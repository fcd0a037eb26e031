"""Running the command line in this process, on models that are right, wrong, or no models at all."""

from __future__ import annotations

from typing import NoReturn

import pytest

import fusedres
from fusedres import cli


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The exit code, what was printed, and what was said besides."""
    code = cli.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def break_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the output of every fused network a thousandth too large."""
    forward = fusedres.FusedResidualStack.forward
    monkeypatch.setattr(fusedres.FusedResidualStack, "forward", lambda self, x: forward(self, x) * 1.001)


def raises() -> NoReturn:
    raise RuntimeError("no data\nat all")
