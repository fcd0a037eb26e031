"""Programs of users, by `mypy --strict` against an installed package: its types are there, and are what they say."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import distribution
import pytest

TYPED = Path(__file__).parent / "typed"


def expected(file: Path) -> list[tuple[str, int, str]]:
    """The errors that a program says it has: file, line, code."""
    marks = enumerate(file.read_text().splitlines(), 1)
    return [(file.name, i, mark[1]) for i, line in marks if (mark := re.search("# expected: (.*)", line))]


def installed(folder: Path) -> Path:
    """The Python of an environment in the folder that has a wheel of fusedres, and the packages of this one."""
    home = folder / "environment"
    venv.create(home)
    place = Path(sysconfig.get_path("purelib", "venv", {"base": str(home), "platbase": str(home)}))
    with zipfile.ZipFile(distribution.build(folder, isolated=False).wheel) as wheel:
        wheel.extractall(place)
    others = [path for path in sys.path if path.endswith("-packages")]
    (place / "others.pth").write_text("\n".join(others) + "\n")
    return home / "bin" / "python"


@pytest.mark.slow
def test_what_users_write_is_judged_by_its_types(tmp_path):
    files = [TYPED / "program.py", TYPED / "misuse.py"]
    options = ["--strict", "--no-error-summary", "--cache-dir", str(tmp_path / "cache")]
    command = [
        sys.executable,
        "-m",
        "mypy",
        *options,
        "--python-executable",
        str(installed(tmp_path)),
        *map(str, files),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    lines = [line for line in done.stdout.splitlines() if ": note: " not in line]
    found = [re.fullmatch(r"(.*?):(\d+): error: .*\[([\w-]+)\]", line) for line in lines]
    assert all(found), done.stdout
    said = {(Path(one[1]).name, int(one[2]), one[3]) for one in found}  # a union's members have an error each
    assert sorted(said) == sorted(one for file in files for one in expected(file))


@pytest.mark.backends("cpu")
def test_the_program_runs(backend, capsys):
    exec(compile((TYPED / "program.py").read_text(), "program.py", "exec"), {"__name__": "program"})
