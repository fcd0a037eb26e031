"""Running the command line in this process or one of its own, on models that are right, wrong, or none at all."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from torch import Tensor, nn

import fusedres
from fusedres import cli

ROOT = Path(__file__).parent.parent


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """The exit code, what was printed, and what was said besides."""
    code = cli.main(list(map(str, arguments)))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def unread(*arguments: object) -> int:
    """The exit code where standard output is a pipe whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream, redirect_stdout(stream):
        return cli.main([*map(str, arguments)])  # what is left goes nowhere, or closing would fail


def started(*arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.Popen[str]:
    """`python -m fusedres …`, without a word on whether Triton interprets."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "fusedres", *map(str, arguments)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=environment, **piped)


def process(*arguments: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """The same, at its end."""
    with started(*arguments, cwd=cwd, **variables) as one:
        out, err = one.communicate(timeout=120)
    return subprocess.CompletedProcess(one.args, one.returncode, out, err)


def break_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the output of every fused network a thousandth too large."""
    forward = fusedres.FusedResidualStack.forward
    monkeypatch.setattr(fusedres.FusedResidualStack, "forward", lambda self, x: forward(self, x) * 1.001)


class Raises(nn.Linear):
    """A model of the user's with a bug."""

    def forward(self, x: Tensor) -> NoReturn:
        raise KeyError(torch.Size([3]))


def raises() -> NoReturn:
    raise RuntimeError("no data\nat all")
