"""The README's examples run as printed, each by itself."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


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
