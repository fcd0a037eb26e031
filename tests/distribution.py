"""`make dist`: a wheel and an sdist, built in isolation, looked into, installed and run where there is no repository.

python tests/distribution.py [FOLDER]       where they are put [dist]
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
PROGRAM = ROOT / "tests" / "installed.py"
PACKAGED = (".py", ".typed", ".json", ".cpp", ".h")  # endings, below fusedres/ and kernels/
BESIDE = {"LICENSE", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}  # in an sdist


class Built(NamedTuple):
    """A wheel of the repository, an sdist of it, and a wheel of that sdist."""

    wheel: Path
    sdist: Path
    wheel_of_sdist: Path


def build(folder: Path, *, isolated: bool = True) -> Built:
    """Builds all three in the folder, from a copy of the repository: what was built before is none of it."""
    source = folder / "source"
    names = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", *names))
    tool = [sys.executable, "-m", "build", *([] if isolated else ["--no-isolation"]), str(source)]
    run([*tool, "--outdir", str(folder / "from-sdist")], cwd=folder)
    run([*tool, "--wheel", "--outdir", str(folder / "wheel")], cwd=folder)
    (wheel,), (sdist,), (wheel_of_sdist,) = (
        list((folder / place).glob(pattern))
        for place, pattern in (("wheel", "*.whl"), ("from-sdist", "*.tar.gz"), ("from-sdist", "*.whl"))
    )
    return Built(wheel, sdist, wheel_of_sdist)


def packaged(root: Path = ROOT) -> set[str]:
    """What the package consists of, by its place in a wheel."""
    files = [(path, path.relative_to(root)) for top in ("fusedres", "kernels") for path in (root / top).rglob("*")]
    return {
        str(Path("fusedres", place) if place.parts[0] == "kernels" else place)
        for path, place in files
        if path.suffix in PACKAGED and place.parts[:2] != ("fusedres", "kernels") and "__pycache__" not in place.parts
    }


def faults(built: Built, expected: set[str]) -> list[str]:
    """What is missing from the three, or too much, or differs, one line each."""
    of_wheel, of_other = (_wheel_contents(path) for path in (built.wheel, built.wheel_of_sdist))
    of_sdist = _sdist_contents(built.sdist)
    package = {name for name in of_wheel if ".dist-info/" not in name}
    found = _differences("the wheel", package, expected)
    found += [f"the wheel lacks {name}" for name in ("LICENSE", "METADATA") if not _has(of_wheel, f"/{name}")]
    beside = {name for name in of_sdist if not name.startswith("fusedres.egg-info/")}
    found += _differences("the sdist", beside, expected | BESIDE)
    names = [name for name in package if of_wheel[name] != of_other.get(name)]
    names += [name for name in of_other if name not in of_wheel]
    return found + [f"the wheel of the sdist has another {name}" for name in sorted(names)]


def _differences(what: str, names: set[str], expected: set[str]) -> list[str]:
    missing, unknown = sorted(expected - names), sorted(names - expected)
    return [f"{what} lacks {name}" for name in missing] + [f"{what} has {name}, unasked" for name in unknown]


def _has(names: dict[str, bytes], end: str) -> bool:
    return any(name.endswith(end) for name in names)


def _wheel_contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as wheel:
        return {one.filename: wheel.read(one) for one in wheel.infolist() if not one.is_dir()}


def _sdist_contents(path: Path) -> dict[str, bytes]:
    """By the place below its one folder."""
    with tarfile.open(path) as sdist:
        files = [one for one in sdist.getmembers() if not one.isdir()]
        return {one.name.partition("/")[2]: sdist.extractfile(one).read() for one in files}


def try_out(archive: Path, folder: Path) -> None:
    """Installs it into a fresh environment in the folder and runs it there: build, a program of a user's, self-test."""
    home, empty = folder / "environment", folder / "empty"
    empty.mkdir(parents=True)
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    variables = {"FUSEDRES_CACHE": str(folder / "cache")}  # where nothing of the repository's has been built
    say(f"{archive.name}: installing it and what it needs …")
    install = ["install", "--disable-pip-version-check", "-q", "-c", str(CONSTRAINTS), str(archive)]
    run([python, "-I", "-m", "pip", *install], cwd=empty)
    for words in (["-m", "fusedres", "build"], [str(PROGRAM)], ["-m", "fusedres", "check"]):
        say(f"{archive.name}: python {' '.join(words)}")
        run([python, "-I", *words], cwd=empty, is_shown=True, **variables)  # -I: neither PYTHONPATH nor this folder
    if left := list(empty.iterdir()):
        raise SystemExit(f"{archive.name} leaves {left[0].name} where it is called")


def run(command: Sequence[str], cwd: Path, is_shown: bool = False, **variables: str) -> None:
    """Runs to the end; SystemExit with all that was said where that is not 0."""
    out = None if is_shown else subprocess.PIPE
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, stdout=out, stderr=out and subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout or ''}\n{' '.join(command)}: exit code {done.returncode}")


def say(text: str) -> None:
    print(text, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Builds a wheel and an sdist, installs and runs both.")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "dist", help="where they are put [dist]")
    out = parser.parse_args(argv).folder.absolute()
    with tempfile.TemporaryDirectory(prefix="fusedres-dist-") as temporary:
        folder = Path(temporary)
        built = build(folder)
        if found := faults(built, packaged()):
            say("\n".join(found))
            return 1
        say(f"{built.wheel.name}, {built.sdist.name}: {len(packaged())} files of the package and no other")
        for archive in (built.wheel, built.sdist):
            try_out(archive, folder / archive.suffix.strip("."))
        out.mkdir(parents=True, exist_ok=True)
        for archive in (built.wheel, built.sdist):
            say(shutil.copy(archive, out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
