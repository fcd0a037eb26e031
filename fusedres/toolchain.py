"""What the CPU library is built with: the compiler, ninja, this machine's instruction set, and the flags."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

BINDING = "binding.cpp"  # the one source that reads torch's headers
# One level for a whole library: of two, the linker could keep an inline function compiled for the wrong one.
LEVELS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}
# No -fopenmp: it would link the compiler's own OpenMP runtime beside torch's. -std is what torch's headers ask for.
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]


class Unavailable(Exception):
    """Why there is no library, in one sentence."""


def level() -> str:
    """The instruction set that torch chose for its own kernels, ATEN_CPU_CAPABILITY included."""
    capability = torch.backends.cpu.get_cpu_capability()
    return next((level for level in LEVELS if capability.startswith(level.upper())), "baseline")


def accepted_levels() -> list[str]:
    """Levels of this kind of processor that the compiler knows, whatever this machine can run."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return ["baseline"]
    probe = [*find_compiler().command, "-x", "c++", "-fsyntax-only", os.devnull]
    return [level for level, flags in LEVELS.items() if run([*probe, *flags]).returncode == 0]


def flags(level: str) -> list[str]:
    """What every source of a library of this level is compiled with."""
    if sys.platform not in ("linux", "darwin"):
        raise Unavailable(f"the CPU kernels are built on Linux and macOS, and this is {sys.platform}")
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, got {level!r}")
    optimise = ["-O3"]
    if chosen := _sanitizers():
        optimise = ["-O2", "-g", "-fno-omit-frame-pointer", f"-fsanitize={chosen}", "-fno-sanitize-recover=undefined"]
    # The user's flags stand first: environments that put -O2 there mean it as a default, and the kernels need -O3.
    users = shlex.split(os.environ.get("CXXFLAGS", ""))
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [*users, *COMMON, *optimise, *LEVELS[level], abi]


def _sanitizers() -> str:
    return os.environ.get("FUSEDRES_SANITIZE", "")


def require_sanitizer() -> None:
    """AddressSanitizer ends the process if it is loaded after it has started."""
    if "address" in _sanitizers() and not hasattr(ctypes.CDLL(None), "__asan_init"):
        raise Unavailable("FUSEDRES_SANITIZE=address needs its runtime in LD_PRELOAD, as tests/sanitize.sh does")


@dataclass(frozen=True)
class Compiler:
    command: tuple[str, ...]  # its first words
    identity: str  # where the program is, its arguments, and what it calls itself


def find_compiler() -> Compiler:
    """CXX, or the C++ side of CC, or c++, g++ or clang++ on PATH."""
    command = _compiler_command()
    try:
        said = run([*command, "--version"])
    except OSError as error:
        raise Unavailable(f"no C++ compiler: {shlex.join(command)} does not run: {error}") from error
    if said.returncode:
        raise Unavailable(f"no C++ compiler: {shlex.join(command)} --version ends with {said.returncode}")
    facts = os.path.realpath(command[0]), *command[1:], *said.stdout.splitlines()[:1]
    return Compiler(tuple(command), repr(facts))


def _compiler_command() -> list[str]:
    if words := shlex.split(os.environ.get("CXX", "")):
        if program := shutil.which(words[0]):
            return [program, *words[1:]]
        raise Unavailable(f"no C++ compiler: CXX={os.environ['CXX']} names no program")
    c = os.environ.get("CC", "")
    for words in (_beside_c(shlex.split(c)), ["c++"], ["g++"], ["clang++"]):
        if words and (program := shutil.which(words[0])):
            return [program, *words[1:]]
    beside = f", nor one beside CC={c}" if c else ""
    raise Unavailable(f"no C++ compiler: CXX is not set, and there is no c++, g++ or clang++ on PATH{beside}")


def _beside_c(words: list[str]) -> list[str]:
    """gcc-13 -> g++-13, /opt/bin/clang -> /opt/bin/clang++, ccache gcc -> ccache g++; empty where none is known."""
    sides = {"gcc": "g++", "clang": "clang++", "cc": "c++"}
    for i, word in enumerate(words):
        if found := re.fullmatch(r"((?:.*[/-])?)(gcc|clang|cc)(-[\d.]+)?", word):
            path, name, version = found.groups("")
            return [*words[:i], path + sides[name] + version, *words[i + 1 :]]
    return []


def find_ninja() -> str:
    """The program on PATH, or the one in the Python package."""
    if program := shutil.which("ninja"):
        return program
    try:
        import ninja
    except ImportError:
        raise Unavailable("ninja is neither on PATH nor installed (pip install ninja)") from None
    return str(Path(ninja.BIN_DIR) / "ninja")


def build_file(compiler: Compiler, flags: Sequence[str], sources: Sequence[str], library: str) -> str:
    """What ninja reads in a folder that holds the sources."""
    root = Path(torch.__file__).parent
    compile_ = [*compiler.command, *flags]
    binding = ["-O1", "-isystem", str(root / "include")]  # it only passes calls on
    binding += ["--param", "ggc-min-heapsize=2000000"]  # kB before gcc tidies up, which takes it a fifth of the time
    link = [*compile_, "-shared"]
    libraries = ["-L", str(root / "lib"), "-ltorch_cpu", "-lc10"]
    if sys.platform == "darwin":
        libraries += ["-Wl,-rpath," + str(root / "lib")]
    else:
        libraries += ["-ldl"]
        link += [] if _sanitizers() else ["-Wl,-z,defs"]  # a symbol nobody has fails here, not as it is loaded
    rules = {"plain": [*compile_, "-c"], "binding": [*compile_, *binding, "-c"]}
    lines = [f"rule {rule}\n  command = {_command(words)} $in -o $out" for rule, words in rules.items()]
    lines += [f"rule link\n  command = {_command(link)} $in {_command(libraries)} -o $out"]
    lines += [f"build {_path(s + '.o')}: {'binding' if s == BINDING else 'plain'} {_path(s)}" for s in sources]
    lines += [f"build {library}: link {' '.join(_path(s + '.o') for s in sources)}"]
    return "\n".join(lines) + "\n"


def _command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def _path(name: str) -> str:
    return re.sub(r"([$ :])", r"$\1", name)


def run(command: list[str], cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs to the end, its messages in English, and without a sanitizer that this process may run under."""
    environment = {**os.environ, "LC_ALL": "C", **variables}
    environment.pop("LD_PRELOAD", None)
    out = subprocess.PIPE
    return subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, text=True
    )
