"""What the command line owes the process it runs in: pipes, encodings, Ctrl-C, and standard output for JSON alone."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import command
import pytest

from fusedres import cli
from fusedres.cli import streams


@pytest.mark.parametrize("arguments", [["--version"], ["env"], ["explain", "--sizes", "3,3"]])
def test_a_reader_that_has_gone_ends_it_quietly(arguments, capsys):
    assert command.unread(*arguments) == 141
    assert capsys.readouterr().err == ""


def test_files_are_written_before_anything_is_printed(tmp_path):
    assert command.unread("compare", "--sizes", "3,3", "--rows", 2, "--out", tmp_path) == 141
    assert sorted(os.listdir(tmp_path)) == ["compare.json", "compare.png"]


def test_a_closed_pipe_as_a_process():
    with command.started("env") as one:
        one.stdout.close()
        assert (one.stderr.read(), one.wait(60)) == ("", 141)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_said(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["--version"]) == 2
    assert capsys.readouterr().err == "fusedres: what is printed cannot be written: No space left on device\n"


def test_a_file_that_fails_is_no_closed_pipe(monkeypatch):
    """A bug of ours keeps its traceback."""
    monkeypatch.setattr(cli, "_outcome", lambda arguments: os.stat("/nowhere/at/all"))
    with pytest.raises(FileNotFoundError):
        cli.main(["env"])


SLOW = """
import pathlib, time

class Slow:
    def __del__(self):
        pathlib.Path("begun").touch()
        time.sleep(0.5)

def calling():
    pathlib.Path("begun").touch()
    time.sleep(60)

def finalising():
    Slow()
    time.sleep(60)
"""


@pytest.mark.parametrize("where", ["calling", "finalising"])
def test_ctrl_c_is_one_line(where, tmp_path, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it, and so
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))  # would all that it starts
    (tmp_path / "slow.py").write_text(SLOW)
    with command.started("compare", f"slow:{where}", "--json", cwd=tmp_path) as one:
        while not (tmp_path / "begun").exists():
            assert one.poll() is None, one.stderr.read()
            time.sleep(0.05)
        one.send_signal(signal.SIGINT)
        assert (*one.communicate(timeout=60), one.returncode) == ("", "fusedres: interrupted\n", 130)


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "replace"])
def test_an_encoding_without_the_signs_stops_nothing(errors, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii", errors=errors))
    assert cli.main(["compare", "--sizes", "3,3", "--rows", "2"]) == 0
    assert (b"mean |?L/?W|" if errors == "replace" else rb"mean |\u2202L/\u2202W|") in written.getvalue()


ALONE = """
import ctypes, os, sys, types
stub = types.ModuleType("fusedres")
stub.__path__, stub.__version__ = [sys.argv[1]], "0"
sys.modules["fusedres"] = stub  # streams need none of torch
from fusedres.cli import device, streams

print("before")
with streams.kept_for_json():
    print("Python")
    os.write(1, b"descriptor\\n")
    ctypes.CDLL(None).puts(b"C")
    os.system("echo child")
    if len(sys.argv) > 2:
        sys.modules["triton"] = sys
        os.execv = lambda path, arguments: (os.write(1, b"anew\\n"), os._exit(0))
        device.set_interpreter(True, ["demo"])
print("after")
"""


@pytest.mark.parametrize("anew", [False, True])
def test_standard_output_is_kept_for_json(anew):
    command_line = [sys.executable, "-c", ALONE, str(command.ROOT / "fusedres"), *(["anew"] if anew else [])]
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONUNBUFFERED": ""}  # which C would keep to, too
    done = subprocess.run(command_line, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ("before\nanew\n" if anew else "before\nafter\n")
    assert sorted(done.stderr.split()) == ["C", "Python", "child", "descriptor"]


def test_without_streams_nothing_breaks(monkeypatch):
    """As where a process is started with both closed."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with streams.kept_for_json():
        print("nobody reads this")
    assert cli.main(["env", "--json"]) == 0
