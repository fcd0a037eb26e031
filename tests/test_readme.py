"""The README's examples run as printed, each by itself; those of docs/ page by page, and print what the pages say."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tolerances

import fusedres

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.S | re.M)


def test_the_examples_run(tmp_path, monkeypatch, capsys):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(examples) == 3
    monkeypatch.chdir(tmp_path)
    for example in examples:
        smaller = example.replace("4096, ", "8, ")  # the interpreter's patience
        exec(compile(smaller, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert "[8, 256] -> [8, 256] torch.float32: triton" in printed
    assert "6 of 6 layers take a skip" in printed
    assert "12 of 13 layers take a skip" in printed
    assert (tmp_path / "gradients.png").stat().st_size > 10_000


def run_page(text: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a page's blocks of python, one after the other; a block of text after one is all that it prints.

    … in the text stands for what is another on another machine.
    """
    namespace: dict[str, object] = {}
    printed = ""
    for kind, body in BLOCK.findall(text):
        if kind == "python":
            exec(compile(body, name, "exec"), namespace)
            printed = capsys.readouterr().out
        elif kind == "text":
            pattern = ".*".join(re.escape(part) for part in body.split("…"))
            assert re.fullmatch(pattern, printed), f"{name} prints\n{printed}"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_a_page_runs_and_prints_what_it_says(page, engine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_page(page.read_text(), page.name, capsys)


def test_a_page_that_prints_something_else_is_found(capsys):
    page = "```python\nprint(1, 2, 3)\n```\n\nand so\n\n```text\n1 … {}\n```\n"
    run_page(page.format(3), "page", capsys)
    with pytest.raises(AssertionError, match="page prints"):
        run_page(page.format(4), "page", capsys)


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="mkdocs is not installed (pip install '.[docs]')")
def test_the_pages_build_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    built = {path.stem for path in (tmp_path / "site").glob("*.html")}
    assert {page.stem for page in PAGES} <= built
    api = (tmp_path / "site" / "api.html").read_text()
    assert all(f'id="fusedres.{name}"' in api for name in ("FusedResidualLinear", "explain", "gradients.Recorder"))


def test_every_public_name_is_on_the_api_page():
    text = (ROOT / "docs" / "api.md").read_text()
    modules = {"functional", "reference"}
    missing = [name for name in set(fusedres.__all__) - modules if f"\n::: fusedres.{name}\n" not in text]
    assert missing == []


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_files_that_a_page_names_are_there(page):
    names = re.findall(r"(?:`|\]\(|\s)((?:bench|kernels|tests|fusedres|docs)/[\w./-]*\w\.\w+)", page.read_text())
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_page_on_numerics_has_the_rules():
    rows = re.findall(r"^\|.*\| (\d+) \| (\d+) \| `(\w+)` \|$", (ROOT / "docs" / "numerics.md").read_text(), re.M)
    rules = {name: rule for name, rule in vars(tolerances).items() if isinstance(rule, tolerances.Rule)}
    assert {name: tolerances.Rule(float(worst), float(rms)) for worst, rms, name in rows} == rules
