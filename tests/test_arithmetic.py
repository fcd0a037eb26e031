"""The page on many devices: its tables are what examples/arithmetic.py prints, and its code runs."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys

import pytest
from torchrun import ROOT

PAGE = ROOT / "docs" / "distributed.md"


@pytest.fixture(scope="module")
def arithmetic():
    spec = importlib.util.spec_from_file_location("arithmetic", ROOT / "examples/arithmetic.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_tables_as_they_are(arithmetic):
    page = PAGE.read_text()
    assert arithmetic.written(page) == page
    for section in arithmetic.SECTIONS.values():
        assert section() in page


def test_another_figure_changes_the_page(arithmetic, monkeypatch):
    page = PAGE.read_text()
    monkeypatch.setattr(arithmetic, "NIC", 25e9)
    assert arithmetic.written(page) != page
    with pytest.raises(ValueError, match="has no place for assumed"):
        arithmetic.written("an empty page")


def test_prose_has_no_figure_of_its_own():
    """With a unit of time, memory or speed, or as a share: those are the script's."""
    prose = re.sub(r"<!-- written by.*?<!-- written until here -->|```.*?```", "", PAGE.read_text(), flags=re.S)
    assert not re.findall(r"\d[\d.]* (?:ms|µs|GB|MB|TFLOP|%)", prose)


def test_what_is_sent_by_counting(arithmetic):
    """Rings by hand: every GPU passes on each of the n parts, n - 1 times gathering and as often reducing."""
    for n in (2, 8):
        parts = [1 / n] * n
        once = sum(parts[: n - 1])
        assert arithmetic.ring(n) == pytest.approx(once)
        bytes_of = 4 * arithmetic.parameters()
        assert arithmetic.ddp(n, 4096)[0] == pytest.approx(2 * once * bytes_of)
    assert arithmetic.parameters(3, 2) == 2 * (9 + 3)
    assert arithmetic.fsdp(2, 64)[0] == pytest.approx(0.5 * (2 + 2 + 4) * arithmetic.parameters())
    assert arithmetic.pipeline(4, 12, 4096)[2] == pytest.approx(12 / 15)


@pytest.mark.parametrize("n", [8, 64, 1024])
def test_the_rows_that_hide_exchanges_do(arithmetic, monkeypatch, n):
    monkeypatch.setattr(arithmetic, "LATENCY", 0.0)
    count = arithmetic.parameters()
    for rows_of, form in ((arithmetic.ddp_rows, arithmetic.ddp), (arithmetic.fsdp_rows, arithmetic.fsdp)):
        enough = rows_of(n)
        computes = [arithmetic.products(r, count, 3) / form(n, r)[2] for r in (0.5 * enough, 1.01 * enough)]
        assert computes[0] < 0.8
        assert computes[1] > 0.97  # what is left is the first layer's
    for t in (2, 8, 64):
        width = arithmetic.tensor_width(t, 0.25)
        _, exchange, step = arithmetic.tensor_parallel(t, 4096, width)
        assert exchange / (step - exchange) == pytest.approx(0.25)


@pytest.mark.usefixtures("engine")
def test_the_code_of_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 5
    code = "\n".join(f"exec({block!r}, {{}})" for block in blocks)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
