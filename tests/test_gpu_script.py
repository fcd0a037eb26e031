"""`bench/gpu.sh`: its parts, and their time; FUSEDRES_DRY=1 runs all of it without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "bench/gpu.sh"


def test_the_stages_of_the_script_are_its_parts_in_their_order_and_end_within_nine_minutes():
    text = SCRIPT.read_text()
    natively = text[text.index("\nelse\n") :]
    stages = re.findall(r'stage "?([\w$-]+)"? (\d+)', natively)
    parts = [name.partition("-")[0] for name, _ in stages]
    assert parts == ["versions", *re.search("^ALL=(.*)$", text, re.M)[1].split(","), "sanitizer"]
    tools = len(re.search("for tool in (.*); do", natively)[1].split())
    assert stages[-2][0] == "sanitizer-$tool"
    assert sum(int(limit) for _, limit in stages[:-2]) + tools * int(stages[-2][1]) <= 540


def test_the_script_refuses_parts_that_it_has_not(tmp_path):
    out = tmp_path / "results"
    run = subprocess.run(["bash", SCRIPT, out, "tests,layers"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 2
    assert run.stderr.endswith("sanitizer, got layers\n")
    assert not out.exists()
