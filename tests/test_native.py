"""Building and finding the CPU library, whatever state the machine is in; mostly with a source of a few lines."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from fusedres import cli, native, toolchain

ROOT = Path(__file__).parent.parent
VARIABLES = "CC", "CXX", "CXXFLAGS", "FUSEDRES_CACHE", "FUSEDRES_NATIVE", "FUSEDRES_SANITIZE", "TRITON_INTERPRET"

try:
    COMPILER = toolchain.find_compiler().command[0]
    toolchain.find_ninja()
except toolchain.Unavailable as why:
    pytest.skip(str(why), allow_module_level=True)

SOURCE = """
#include "answer.h"
#if defined(__AVX512F__)
#define LEVEL "avx512"
#elif defined(__AVX2__)
#define LEVEL "avx2"
#else
#define LEVEL "baseline"
#endif
extern "C" __attribute__((visibility("default"))) const char *level() { return "compiled for " LEVEL; }
extern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }
"""
HEADER = """
#ifndef ANSWER
#define ANSWER 42
#endif
"""


def write_sources(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "answer.cpp").write_text(SOURCE)
    (folder / "answer.h").write_text(HEADER)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for a source of a few lines, in a process that has decided nothing yet."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SOURCES", write_sources(tmp_path / "sources"))
    forget(monkeypatch)
    return tmp_path / "cache"


def forget(monkeypatch) -> None:
    monkeypatch.setattr(native._Process, "is_decided", False)
    monkeypatch.setattr(native._Process, "reason", None)
    monkeypatch.setattr(torch.ops, "loaded_libraries", set())


def missing() -> tuple[str | None, list[str]]:
    """The reason, and what was warned of in two calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reason = native.missing()
        assert native.missing() == reason
    return reason, [str(warning.message) for warning in caught]


def loaded() -> Path:
    (path,) = torch.ops.loaded_libraries
    return Path(path)


def answer(path: Path) -> int:
    return ctypes.CDLL(str(path)).answer()


def libraries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.so"))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def python(code: str, *before: str, **variables: str | Path) -> subprocess.Popen[str]:
    """A process of its own, with none of the variables that a build looks at but those given."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": str(ROOT), **{name: str(value) for name, value in variables.items()}}
    command = [*before, sys.executable, "-c", code]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    return out.strip(), err


MISSING = """
from pathlib import Path
import torch
from fusedres import native
native.SOURCES = Path({sources!r})
print(native.missing(), *torch.ops.loaded_libraries)
"""


def test_the_first_need_builds_and_the_next_finds(cache, monkeypatch, capfd):
    assert missing() == (None, [])
    assert loaded().parent == cache
    assert answer(loaded()) == 42
    said = capfd.readouterr().err
    assert said.startswith("fusedres: building its CPU kernels, once for this machine (10 to 30 seconds) … done in ")
    assert said.count("\n") == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert {path.name for path in cache.iterdir()} == {loaded().name, "lock"}

    first, made = loaded(), loaded().stat().st_mtime_ns
    forget(monkeypatch)
    assert missing() == (None, [])
    assert (loaded(), first.stat().st_mtime_ns) == (first, made)
    assert not capfd.readouterr().err


def test_importing_asks_the_machine_nothing(tmp_path):
    code = """
import sys, torch
sys.addaudithook(lambda event, arguments: sys.exit(event) if event in ("subprocess.Popen", "os.mkdir") else None)
import fusedres, fusedres.native
"""
    finish(python(code, FUSEDRES_CACHE=tmp_path / "cache", PYTHONDONTWRITEBYTECODE="1"))
    assert not (tmp_path / "cache").exists()


def test_a_warm_start_is_short(monkeypatch):
    """The real library: three new processes, the fastest of which had the machine to itself."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    native.build(toolchain.level())
    code = """
import time, torch
from fusedres import native
begin = time.perf_counter()
assert native.missing() is None
print(time.perf_counter() - begin)
"""
    assert min(float(finish(python(code))[0]) for _ in range(3)) < 0.3


def test_switched_off_it_says_so_and_warns_of_nothing(cache, monkeypatch):
    monkeypatch.setenv("FUSEDRES_NATIVE", "0")
    assert missing() == ("FUSEDRES_NATIVE=0 switches them off", [])
    assert not cache.exists()


def test_many_threads_build_once(cache, capfd):
    reasons = []
    threads = [threading.Thread(target=lambda: reasons.append(native.missing())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reasons == [None] * 4
    assert capfd.readouterr().err.count("building") == 1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_its_parents_thread():
    with native._Process.lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if native._Process.lock.acquire(timeout=5) else 1)
        assert os.waitpid(child, 0)[1] == 0


# Without a tool


@pytest.mark.parametrize("hidden", [{"PATH": "/nonexistent"}, {"CXX": "/nonexistent"}], ids=["no PATH", "wrong CXX"])
def test_a_layer_without_a_compiler_is_right_and_warns_once(tmp_path, hidden):
    code = """
import warnings, torch
from fusedres import FusedResidualLinear, native
layer, x = FusedResidualLinear(8), torch.randn(5, 8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outputs = [layer(x), layer(x)]
    assert native.missing().startswith("no C++ compiler: CXX"), native.missing()
expected = x + torch.nn.functional.gelu(torch.nn.functional.linear(x, layer.weight, layer.bias))
for y in outputs:
    torch.testing.assert_close(y, expected)
print(*[warning.message for warning in caught], sep="\\n")
"""
    out, _ = finish(python(code, FUSEDRES_CACHE=tmp_path / "cache", **hidden))
    (warning,) = out.splitlines()
    assert warning.startswith("fusedres has no CPU kernels, PyTorch's own operations run instead: no C++ compiler: CXX")


def test_without_ninja_it_says_what_to_install(cache, tmp_path, monkeypatch):
    script(tmp_path / "bin" / "c++", f'exec {COMPILER} "$@"')
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "ninja", None)
    reason, warned = missing()
    assert reason == "ninja is neither on PATH nor installed (pip install ninja)"
    assert len(warned) == 1


def test_a_compiler_that_cannot_run_is_named(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", "exit 3")))
    reason, warned = missing()
    assert reason == f"no C++ compiler: {tmp_path}/c++ --version ends with 3"
    assert len(warned) == 1


def test_a_library_built_elsewhere_serves_where_no_compiler_is(cache, monkeypatch):
    path = native.build(toolchain.level())
    monkeypatch.setenv("PATH", "/nonexistent")
    assert missing() == (None, [])
    assert loaded() == path


def test_a_failed_build_shows_its_first_error_and_keeps_the_log(cache):
    (native.SOURCES / "wrong.cpp").write_text("int f() {\n    return g();\n}\nint h() { return i(); }\n")
    reason, warned = missing()
    assert reason.startswith("the build failed: wrong.cpp:2:")
    assert len(warned) == 1
    log = Path(reason.split("(all of it: ")[1].rstrip(")"))
    assert "wrong.cpp:4:" in log.read_text()
    assert {path.name for path in cache.iterdir()} == {"lock", log.name}


def test_a_failed_build_for_this_process_keeps_its_log_too(cache, tmp_path, monkeypatch):
    (native.SOURCES / "wrong.cpp").write_text("int f() { return g(); }\n")
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(native.tempfile, "tempdir", str(tmp_path))
    reason, warned = missing()
    assert len(warned) == 1
    assert "wrong.cpp:1:" in Path(reason.split("(all of it: ")[1].rstrip(")")).read_text()
    assert len(list(tmp_path.glob("fusedres_cpu-*"))) == 1  # the log alone is left


def test_a_symbol_that_nobody_has_fails_the_build(cache):
    (native.SOURCES / "wrong.cpp").write_text("int g();\nint f() { return g(); }\n")
    reason, _ = missing()
    assert reason.startswith("the build failed: ")
    assert "g()" in Path(reason.split("(all of it: ")[1].rstrip(")")).read_text()


def test_without_sources_it_says_where_it_looked(cache):
    (native.SOURCES / "answer.cpp").unlink()
    assert missing()[0] == f"there are no sources *.cpp in {native.SOURCES}"


# Which compiler, and how


def recorder(path: Path) -> Path:
    """A compiler that lists its calls beside itself."""
    return script(path, f'echo "$@" >> "{path}.calls"\nexec {COMPILER} "$@"')


def test_cxx_is_called_with_its_arguments(cache, tmp_path, monkeypatch):
    wrapper = recorder(tmp_path / "a folder" / "my c++")
    monkeypatch.setenv("CXX", f"'{wrapper}' -DANSWER='40 + 3'")
    assert answer(native.build(toolchain.level())) == 43
    calls = Path(f"{wrapper}.calls").read_text()
    assert all(call.startswith("-DANSWER=40 + 3 ") for call in calls.splitlines())
    assert "answer.cpp" in calls


def test_cc_names_the_compiler_beside_it(cache, tmp_path, monkeypatch):
    wrapper = recorder(tmp_path / "bin" / "g++-77")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("CC", "gcc-77")
    native.build(toolchain.level())
    assert "answer.cpp" in Path(f"{wrapper}.calls").read_text()


@pytest.mark.parametrize(
    ("c", "beside"),
    [
        ("gcc", "g++"),
        ("clang-19", "clang++-19"),
        ("/opt/bin/cc", "/opt/bin/c++"),
        ("aarch64-linux-gnu-gcc-12.2", "aarch64-linux-gnu-g++-12.2"),
        ("ccache clang", "ccache clang++"),
        ("icc", ""),
        ("", ""),
    ],
)
def test_the_compiler_beside_cc(c, beside):
    assert " ".join(toolchain._beside_c(c.split())) == beside


def test_cxxflags_are_used(cache, monkeypatch):
    monkeypatch.setenv("CXXFLAGS", "-DANSWER=44")
    assert answer(native.build(toolchain.level())) == 44


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_the_level_is_torchs(tmp_path, capability):
    code = "from fusedres import toolchain; print(toolchain.level(), toolchain.torch.backends.cpu.get_cpu_capability())"
    level, torchs = finish(python(code, ATEN_CPU_CAPABILITY=capability))[0].split(maxsplit=1)
    assert level == ("avx2" if torchs == "AVX2" else "baseline")


def test_every_level_is_a_library_of_its_own(cache):
    levels = toolchain.accepted_levels()
    paths = {level: native.build(level) for level in levels}
    assert len(set(paths.values())) == len(levels)
    for level, path in paths.items():
        assert path.name.startswith(f"fusedres_cpu-{level}-")
        assert f"compiled for {level}".encode() in path.read_bytes()


def changed_header(monkeypatch, tmp_path):
    (native.SOURCES / "answer.h").write_text(HEADER + "// changed\n")


def changed_source(monkeypatch, tmp_path):
    (native.SOURCES / "answer.cpp").write_text(SOURCE + "// changed\n")


def renamed_source(monkeypatch, tmp_path):
    (native.SOURCES / "answer.cpp").rename(native.SOURCES / "renamed.cpp")


def other_torch(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", "99.0")


def other_flags(monkeypatch, tmp_path):
    monkeypatch.setenv("CXXFLAGS", "-DUNUSED")


def other_compiler(monkeypatch, tmp_path):
    (tmp_path / "c++").rename(tmp_path / "g++")
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))


def newer_compiler(monkeypatch, tmp_path):
    script(tmp_path / "c++", VERSIONED.format(version=2))


VERSIONED = f'case "$1" in --version) echo version {{version}}; exit;; esac\nexec {COMPILER} "$@"'


@pytest.mark.parametrize(
    "change",
    [changed_header, changed_source, renamed_source, other_torch, other_flags, other_compiler, newer_compiler],
)
def test_what_the_bits_follow_from_is_in_the_name(cache, tmp_path, monkeypatch, change):
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", VERSIONED.format(version=1))))
    first = native.build(toolchain.level())
    assert native.build(toolchain.level()) == first
    change(monkeypatch, tmp_path)
    assert native.build(toolchain.level()) != first
    assert len(libraries(cache)) == 2


def test_a_sanitizer_is_in_the_name_and_needs_its_runtime(cache, monkeypatch):
    if hasattr(ctypes.CDLL(None), "__asan_init"):
        pytest.skip("this process runs under AddressSanitizer")
    plain = native._recipe(toolchain.level())
    monkeypatch.setenv("FUSEDRES_SANITIZE", "address,undefined")
    sanitized = native._recipe(toolchain.level())
    assert sanitized.stem() != plain.stem()
    assert "-fsanitize=address,undefined" in sanitized.flags
    reason, warned = missing()  # loading it would end the process
    assert reason.startswith("FUSEDRES_SANITIZE=address needs its runtime in LD_PRELOAD")
    assert len(warned) == 1


# Two at once, and killed


@pytest.mark.parametrize("wait_s", [60, 0], ids=["in turn", "without a lock"])
def test_two_processes_build_at_once(cache, tmp_path, wait_s):
    code = f"""
import sys
from fusedres import native
native.LONGEST_WAIT_S = {wait_s}
print("ready", flush=True)
sys.stdin.readline()
{MISSING.format(sources=str(native.SOURCES))}
"""
    both = [python(code, FUSEDRES_CACHE=cache) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in both:
        process.stdin.write("go\n")
        process.stdin.flush()
    (one, said_by_one), (other, said_by_other) = map(finish, both)
    assert one == other
    assert one.startswith("None ")
    assert one.split()[1:] == [str(path) for path in libraries(cache)]
    assert {path.name for path in cache.iterdir()} == {libraries(cache)[0].name, "lock"}
    if wait_s:
        assert (said_by_one + said_by_other).count("building") == 1


def test_a_killed_build_stops_nobody(cache, tmp_path, monkeypatch):
    hang = tmp_path / "hang"
    hang.touch()
    wrapper = script(
        tmp_path / "c++",
        f'case "$*" in *answer.cpp*) [ -e {hang} ] && {{ touch {hang}.now; exec sleep 60; }};; esac\n'
        f'exec {COMPILER} "$@"',
    )
    process = python(MISSING.format(sources=str(native.SOURCES)), CXX=wrapper, FUSEDRES_CACHE=cache)
    try:
        for _ in range(600):
            if Path(f"{hang}.now").exists():
                break
            time.sleep(0.1)
        process.kill()  # its compiler lives on, as it would
        process.wait()
        hang.unlink()
        (left,) = cache.glob("building-*")

        monkeypatch.setenv("CXX", str(wrapper))
        begin = time.monotonic()
        path = native.build(toolchain.level())
        assert time.monotonic() - begin < 30  # sooner than a lock would have been given up
        assert answer(path) == 42
        assert left.exists()  # it may belong to a build that still runs

        os.utime(left, (0, time.time() - 2 * native.STALE_S))
        native.build("baseline" if toolchain.level() != "baseline" else "avx2")
        assert not left.exists()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


# A cache that cannot be used, or not be trusted


def assert_built_for_this_process(why: str) -> None:
    reason, warned = missing()
    assert reason is None
    (warning,) = warned
    assert warning.startswith("the CPU kernels are built for this process alone, as no library can be kept: ")
    assert why in warning
    assert not loaded().exists()  # it is in use, and needs its file no more
    with pytest.raises(toolchain.Unavailable, match="no library can be kept: "):
        native.build(toolchain.level())


def test_a_cache_that_cannot_be_made(cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSEDRES_CACHE", str(tmp_path / "file" / "cache"))
    assert_built_for_this_process(str(tmp_path / "file"))


def test_a_user_without_a_home(cache, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("FUSEDRES_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert_built_for_this_process("the cache has no place: Could not determine home directory.")


def test_where_the_cache_is(cache, tmp_path, monkeypatch):
    assert native.cache_folder() == cache
    monkeypatch.delenv("FUSEDRES_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert native.cache_folder() == tmp_path / "xdg" / "fusedres"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its specification says to ignore
    assert native.cache_folder() == tmp_path / ".cache" / "fusedres"
    before = os.umask(0)
    try:
        native.build(toolchain.level())
    finally:
        os.umask(before)
    assert (tmp_path / ".cache").stat().st_mode & 0o777 == 0o700


def test_a_cache_without_room_for_what_the_compiler_writes(cache, tmp_path, monkeypatch):
    full = f'case "$PWD" in {cache}*) echo "fatal error: error writing to x.o: No space left on device"; exit 1;; esac'
    monkeypatch.setenv("CXX", str(script(tmp_path / "c++", f'{full}\nexec {COMPILER} "$@"')))
    assert_built_for_this_process("No space left on device")
    assert [path.name for path in cache.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    ("options", "why"),
    [("size=4k", "No space left on device"), ("size=24k", "No space left on device"), ("ro", "Read-only file system")],
    ids=["no room for sources", "no room for a library", "read-only"],
)
def test_a_real_file_system_that_is_full_or_read_only(cache, options, why):
    mount = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount", "sh", "-c"]
    mount += [f'mount -t tmpfs -o mode=700,{options} none "$FUSEDRES_CACHE" && exec "$@"', "sh"]
    cache.mkdir(0o700)
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*mount, "true"], env={**os.environ, "FUSEDRES_CACHE": str(cache)}, capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("mounting a file system in a namespace is not allowed here")
    code = "import warnings; warnings.simplefilter('always')\n" + MISSING.format(sources=str(native.SOURCES))
    out, said = finish(python(code, *mount, FUSEDRES_CACHE=cache))
    assert out.startswith("None ")
    assert not out.startswith(f"None {cache}")
    assert said.count("built for this process alone") == 1
    assert why in said


@pytest.mark.parametrize("mode", [0o770, 0o702], ids=["group", "everyone"])
def test_a_cache_that_others_may_write_to_is_refused(cache, mode):
    native.build(toolchain.level())  # a library that would do, and that others may since have replaced
    cache.chmod(mode)
    assert_built_for_this_process(f"others than its owner may write to {cache}")


def test_a_cache_in_a_folder_that_everyone_may_write_to_is_refused(cache, monkeypatch):
    native.build(toolchain.level())
    cache.parent.chmod(0o777)
    assert_built_for_this_process(f"everyone may write to {cache.parent}")
    forget(monkeypatch)
    cache.parent.chmod(0o1777)  # as /tmp is: nobody else can rename what is in it
    assert missing() == (None, [])


def test_a_cache_of_another_user_is_refused(cache):
    if os.geteuid():
        pytest.skip("only root can give a folder away")
    native.build(toolchain.level())
    os.chown(cache, 12345, -1)
    assert_built_for_this_process(f"{cache} belongs to user 12345, this is user 0")


# A library that is not whole


def test_a_library_cut_short_is_built_again(cache):
    path = native.build(toolchain.level())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert native.build(toolchain.level()).read_bytes() == whole
    path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    assert missing() == (None, [])
    assert loaded().read_bytes() == whole


def test_a_library_that_others_may_write_to_is_built_again(cache):
    path = native.build(toolchain.level())
    path.chmod(0o666)
    assert missing() == (None, [])
    assert loaded().stat().st_mode & 0o777 == 0o644


def test_a_whole_library_that_does_not_load_is_built_again(cache):
    recipe = native._recipe(toolchain.level())
    text = b"for another machine"
    cache.mkdir(0o700)
    (cache / recipe.name(toolchain.find_compiler(), text)).write_bytes(text)
    assert missing() == (None, [])
    assert answer(loaded()) == 42


def test_a_built_library_that_does_not_load_is_a_reason(cache, monkeypatch):
    (native.SOURCES / "undefined.cpp").write_text("int g();\nint f() { return g(); }\n")
    strict = toolchain.build_file
    monkeypatch.setattr(toolchain, "build_file", lambda *facts: strict(*facts).replace("-Wl,-z,defs", ""))
    reason, warned = missing()
    assert reason.startswith("the library was built, and does not load: ")
    assert "undefined symbol" in reason
    assert len(warned) == 1


# What would be done


def test_the_outlook_builds_and_makes_nothing(cache, monkeypatch):
    expected = native.Outlook("to build", "not built yet: the first call builds it, once, in 10 to 30 seconds")
    assert native.outlook() == expected
    assert not cache.exists()
    assert not torch.ops.loaded_libraries
    cache.mkdir(0o700)
    assert native.outlook() == expected
    assert not list(cache.iterdir())


def test_the_outlook_loads_what_is_there(cache, monkeypatch):
    path = native.build(toolchain.level())
    assert native.outlook() == native.Outlook("loaded", "it lay in the cache")
    assert loaded() == path
    assert native.outlook().because == "this process has loaded it"
    assert missing() == (None, [])


def test_the_outlook_says_what_is_in_the_way(cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)
    state, because = native.outlook()
    assert state == "to build"
    assert because.startswith("not built yet: every process builds its own, as others than its owner may write to ")
    monkeypatch.setenv("CXX", "/nonexistent")
    assert native.outlook() == native.Outlook("none", "no C++ compiler: CXX=/nonexistent names no program")
    monkeypatch.setenv("FUSEDRES_NATIVE", "0")
    assert native.outlook() == native.Outlook("none", "FUSEDRES_NATIVE=0 switches them off")
    assert missing()[0] == native.outlook().because


# The command


def test_build_prints_the_library_and_seconds(cache, capsys):
    for _ in range(2):
        assert cli.main(["build"]) == 0
        path, seconds, unit = capsys.readouterr().out.split()
        assert [Path(path)] == libraries(cache)
        assert (float(seconds) >= 0, unit) == (True, "s")
    assert cli.main(["build", "--all-levels"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(libraries(cache)) == len(toolchain.accepted_levels())


def test_build_fails_with_the_reason(cache, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent")
    assert cli.main(["build"]) == 2
    assert capsys.readouterr().err == "fusedres build: no C++ compiler: CXX=/nonexistent names no program\n"
