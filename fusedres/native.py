"""The library of the CPU kernels: found in the user's cache or built there by ninja at first need, then loaded.

A library's name says what its bits follow from, `fusedres_cpu-LEVEL-KEY-COMPILER-SUM.so`: its instruction set, sources
with flags and torch, who compiled it, and its own checksum. So it is put in place by one rename, and proves itself.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from . import toolchain
from .toolchain import Compiler, Unavailable, find_compiler

SOURCES = Path(__file__).parent / "kernels" / "cpu"
NAME = "fusedres_cpu"
SCRATCH = "building-"
STALE_S = 3600  # a scratch folder as old as this belongs to a build that was killed
SWITCHED_OFF = "FUSEDRES_NATIVE=0 switches them off"
LONGEST_WAIT_S = 60  # for another process that builds; after that this one builds too


class _Process:
    """What this process found out, once."""

    lock = threading.Lock()
    is_decided = False
    reason: str | None = None


if hasattr(os, "register_at_fork"):  # another thread may have held it as this process was forked
    os.register_at_fork(after_in_child=lambda: setattr(_Process, "lock", threading.Lock()))


def missing() -> str | None:
    """None with torch.ops.fusedres_cpu loaded, built first where need be; or why it is not, in one sentence."""
    if _Process.is_decided:
        return _Process.reason
    notice = None
    with _Process.lock:
        if not _Process.is_decided:
            _Process.reason, notice = _decide()
            _Process.is_decided = True
    if notice:
        warnings.warn(notice, stacklevel=2)
    return _Process.reason


def _decide() -> tuple[str | None, str | None]:
    """(why there is no library, what to warn of), None each where there is nothing to say."""
    if os.environ.get("FUSEDRES_NATIVE") == "0":
        return SWITCHED_OFF, None
    if _is_registered():
        return None, None
    try:
        return None, _load(_recipe(toolchain.level()))
    except Unavailable as error:
        return str(error), f"fusedres has no CPU kernels, PyTorch's own operations run instead: {error}"


class Outlook(NamedTuple):
    """Of the library: loaded, to build, or none, and why."""

    state: str
    because: str


def outlook() -> Outlook:
    """What `missing` would come to. Loads the library where it lies in the cache; builds and makes nothing."""
    if os.environ.get("FUSEDRES_NATIVE") == "0":
        return Outlook("none", SWITCHED_OFF)
    if _Process.is_decided and _Process.reason:
        return Outlook("none", _Process.reason)
    if _Process.is_decided or _is_registered():
        return Outlook("loaded", "this process has loaded it")
    try:
        toolchain.require_sanitizer()
        recipe, folder = _recipe(toolchain.level()), cache_folder()
        try:
            compiler, why_none = find_compiler(), None
        except Unavailable as error:
            compiler, why_none = None, error
        distrust = distrusted(folder) if folder.exists() else None
        if distrust is None and any(_is_loaded(path) for path in _kept(folder, recipe, compiler)):
            return Outlook("loaded", "it lay in the cache")
        if why_none:
            raise why_none
        toolchain.find_ninja()
    except (Unavailable, RuntimeError, OSError) as error:
        return Outlook("none", str(error))
    if distrust:
        return Outlook("to build", f"not built yet: every process builds its own, as {distrust}")
    return Outlook("to build", "not built yet: the first call builds it, once, in 10 to 30 seconds")


def build(level: str) -> Path:
    """The library of this level in the user's cache, built unless it is there."""
    recipe = _recipe(level)
    try:
        folder, compiler = _own_folder(), find_compiler()
        return next(_kept(folder, recipe, compiler), None) or _build_in_turn(folder, recipe, compiler)
    except OSError as error:
        raise Unavailable(f"no library can be kept: {error}") from error


def _is_registered() -> bool:
    """Whether the library is loaded, maybe by an earlier import of this module: torch aborts if it registers twice."""
    return any(Path(path).name.startswith(NAME) for path in torch.ops.loaded_libraries)


def cache_folder() -> Path:
    """FUSEDRES_CACHE, or fusedres in XDG_CACHE_HOME, or in ~/.cache. RuntimeError where the user has no home."""
    if chosen := os.environ.get("FUSEDRES_CACHE"):
        return Path(chosen).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "fusedres"


@dataclass(frozen=True)
class _Recipe:
    """All that a library's bits follow from, but its compiler."""

    level: str
    sources: tuple[tuple[str, bytes], ...]  # name, text
    flags: tuple[str, ...]

    def stem(self) -> str:
        facts = self.sources, self.flags, torch.__version__, torch.version.git_version
        return f"{NAME}-{self.level}-{_sum(repr(facts).encode())}"

    def name(self, compiler: Compiler, library: bytes) -> str:
        return f"{self.stem()}-{_sum(compiler.identity.encode())}-{_sum(library)}.so"


def _recipe(level: str) -> _Recipe:
    flags = tuple(toolchain.flags(level))
    sources = tuple(
        (path.name, path.read_bytes()) for path in sorted(SOURCES.glob("*")) if path.suffix in (".cpp", ".h")
    )
    if not any(name.endswith(".cpp") for name, _ in sources):
        raise Unavailable(f"there are no sources *.cpp in {SOURCES}")
    return _Recipe(level, sources, flags)


def _load(recipe: _Recipe) -> str | None:
    """Loads the library, from the cache if it can; what to warn of, if anything."""
    toolchain.require_sanitizer()
    try:
        folder = _own_folder()
        try:
            compiler = find_compiler()
        except Unavailable:  # and none is needed, where a library has been built ahead
            if any(_is_loaded(path) for path in _kept(folder, recipe, None)):
                return None
            raise
        kept = list(_kept(folder, recipe, compiler))
        if not any(_is_loaded(path) for path in kept):
            _load_built(_build_in_turn(folder, recipe, compiler, useless=kept))
        return None
    except OSError as error:
        notice = f"the CPU kernels are built for this process alone, as no library can be kept: {error}"

    try:
        with tempfile.TemporaryDirectory(prefix=f"{NAME}-") as private:  # a loaded library needs its file no more
            _load_built(_build(Path(private), recipe, find_compiler(), is_kept=False))
    except OSError as error:
        raise Unavailable(f"{notice}; nor can it be built in a temporary folder: {error}") from error
    return notice


def _load_built(path: Path) -> None:
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise Unavailable(f"the library was built, and does not load: {error.__cause__ or error}") from error


def _is_loaded(path: Path) -> bool:
    """Whether the library loads: one that was built elsewhere may ask for a newer C library than this machine's."""
    try:
        torch.ops.load_library(str(path))
    except OSError:
        return False
    return True


def _own_folder() -> Path:
    """The cache, made where need be; its owner alone may write to it."""
    try:
        folder = cache_folder()
    except RuntimeError as error:  # pathlib's word for no home
        raise OSError(f"the cache has no place: {error}") from error
    for path in reversed([folder, *folder.parents]):
        if not path.exists():
            path.mkdir(0o700, exist_ok=True)
    if reason := distrusted(folder):
        raise OSError(reason)
    return folder.resolve()


def distrusted(folder: Path) -> str | None:
    """Why nothing in this folder is to be loaded; None where it may be. OSError where there is no folder."""
    folder = folder.resolve()
    if reason := _distrust(folder, os.stat(folder)):
        return reason
    for parent in folder.parents:  # whoever can rename a folder can put another in its place
        mode = os.stat(parent).st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            return f"everyone may write to {parent}"
    if os.statvfs(folder).f_flag & getattr(os, "ST_NOEXEC", 0):
        return f"{folder} is mounted noexec"
    return None


def _distrust(path: Path, facts: os.stat_result) -> str | None:
    """Why the path is not to be trusted: someone besides this user and root can write to it."""
    if facts.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to user {facts.st_uid}, this is user {os.geteuid()}"
    if facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others than its owner may write to {path} (chmod go-w would do)"
    return None


def _kept(folder: Path, recipe: _Recipe, compiler: Compiler | None) -> Iterator[Path]:
    """Whole libraries of this recipe, newest first: by this compiler, or by any where the machine has none."""
    by = "*" if compiler is None else _sum(compiler.identity.encode())
    paths = folder.glob(f"{recipe.stem()}-{by}-*.so")
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        with open(path, "rb") as file:
            is_whole = path.stem.endswith(f"-{_sum(file.read())}")
            if is_whole and _distrust(path, os.fstat(file.fileno())) is None:
                yield path  # any other is built again, in its place


def _build_in_turn(folder: Path, recipe: _Recipe, compiler: Compiler, useless: Sequence[Path] = ()) -> Path:
    """Builds, unless another process did while this one waited for it."""
    with _turn(folder):
        path = next((path for path in _kept(folder, recipe, compiler) if path not in useless), None)
        return path or _build(folder, recipe, compiler, is_kept=True)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One process at a time where it can be had soon; two at once are right too, and only slower."""
    import fcntl

    with open(folder / "lock", "w") as file:
        last = time.monotonic() + LONGEST_WAIT_S
        while time.monotonic() < last:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it if this process is killed
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield


def _build(folder: Path, recipe: _Recipe, compiler: Compiler, is_kept: bool) -> Path:
    """Compiles in a scratch folder beside the library's place, and renames the library into it."""
    ninja = toolchain.find_ninja()
    _remove_stale(folder)
    begin = time.monotonic()
    how_often = "once for this machine" if is_kept else "for this process"
    _say(f"fusedres: building its CPU kernels, {how_often} (10 to 30 seconds) …")
    scratch = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=folder))
    outcome = "stopped"
    try:
        for name, text in recipe.sources:
            (scratch / name).write_bytes(text)
        names = [name for name, _ in recipe.sources if name.endswith(".cpp")]
        (scratch / "build.ninja").write_text(toolchain.build_file(compiler, recipe.flags, names, f"{NAME}.so"))
        run = toolchain.run([ninja, "--quiet"], cwd=scratch, TMPDIR=str(scratch))
        if run.returncode:
            outcome = "failed"
            _raise_failure(run.stdout, folder, is_kept)
        library = scratch / f"{NAME}.so"
        library.chmod(0o644)
        path = folder / recipe.name(compiler, library.read_bytes())
        os.replace(library, path)
        outcome = f"done in {time.monotonic() - begin:.1f} s"
        return path
    finally:
        _say(f" {outcome}\n")
        shutil.rmtree(scratch, ignore_errors=True)


def _raise_failure(log: str, folder: Path, is_kept: bool) -> None:
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in log:
            raise OSError(number, os.strerror(number), str(folder))
    lines = [line for line in log.splitlines() if line.strip()]
    first = next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), "".join(lines[-1:]))
    path = folder / "failed.log"
    if not is_kept:  # the folder will be gone
        handle, name = tempfile.mkstemp(prefix=f"{NAME}-", suffix=".log")
        os.close(handle)
        path = Path(name)
    path.write_text(log)
    raise Unavailable(f"the build failed: {first.strip()} (all of it: {path})")


def _remove_stale(folder: Path) -> None:
    for scratch in folder.glob(SCRATCH + "*"):
        with suppress(FileNotFoundError):  # its build has just ended
            if time.time() - scratch.stat().st_mtime > STALE_S:
                shutil.rmtree(scratch, ignore_errors=True)


def _say(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
