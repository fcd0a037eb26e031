"""`fusedres env`: what this machine has, and what would run where. Builds nothing and makes no folder."""

from __future__ import annotations

import argparse
import ast
import os
import platform
import pwd
import stat
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Answer, Parser

if TYPE_CHECKING:
    import torch

    from ..native import Outlook

PREFIXES = ("FUSEDRES_", "TRITON_")
VARIABLES = (
    "CXX",
    "CC",
    "CXXFLAGS",
    "ATEN_CPU_CAPABILITY",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "XDG_CACHE_HOME",
)
DTYPES = ("float32", "float64", "bfloat16", "float16")


def options(parser: Parser, rest: Sequence[str]) -> None:
    """None of its own."""


def run(options: argparse.Namespace) -> Answer:
    from .. import native

    outlook = native.outlook()
    found = {
        "versions": _versions(),
        "gpus": _gpus(),
        "ptxas": _ptxas(),
        "cpu": _cpu(outlook),
        "engine": outlook._asdict(),
        "caches": {"fusedres": _folder(native.cache_folder), "triton": _folder(_triton_cache)},
        "variables": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES) or k in VARIABLES},
        "runs": _runs(outlook),
    }
    for title, facts in found.items():
        print(title)
        for name, fact in facts.items() if isinstance(facts, dict) else enumerate(facts):
            print(f"  {name:16} {_line(fact)}")
        if not facts:
            print("  none")
    return Answer(0, found)


def _line(fact: Any) -> str:
    if isinstance(fact, dict) and set(fact) == {"backend", "because"}:
        return f"{fact['backend']}, because {fact['because']}"
    if isinstance(fact, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_line(one)}" for name, one in fact.items())
    if isinstance(fact, list):
        return ", ".join(map(str, fact))
    return "none" if fact is None else str(fact)


def _versions() -> dict[str, Any]:
    import torch

    from .. import __version__, requirement

    return {
        "fusedres": {"version": __version__, "path": str(Path(__file__).parent.parent)},
        "python": {"version": platform.python_version(), "path": sys.executable},
        "torch": {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "tested": requirement.TESTED,
        },
        "triton": _said(lambda: {"version": import_module("triton").__version__}),
        "system": platform.platform(),
    }


def _gpus() -> list[dict[str, Any]]:
    import torch

    found = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        capability = f"{facts.major}.{facts.minor}"
        memory = f"{facts.total_memory / 2**30:.1f} GiB"
        found.append(
            {
                "name": facts.name,
                "capability": capability,
                "memory": memory,
                "multiprocessors": facts.multi_processor_count,
            }
        )
    return found


def _ptxas() -> dict[str, Any]:
    """Those that Triton would call, TRITON_PTXAS_PATH included; it needs no GPU to say."""

    def tool(name: str) -> dict[str, str]:
        found = getattr(import_module("triton.knobs").nvidia, name)
        return {"version": found.version, "path": found.path}

    return {"ptxas": _said(lambda: tool("ptxas")), "for Blackwell": _said(lambda: tool("ptxas_blackwell"))}


def _cpu(outlook: Outlook) -> dict[str, Any]:
    import torch

    from .. import dispatch, toolchain

    brgemm: Any = "known once the engine is built"
    if outlook.state == "loaded":
        names = ("float32", "bfloat16")
        brgemm = [name for name in names if dispatch.has_brgemm(getattr(torch, name))] or "none"
    return {
        "machine": platform.machine(),
        "instructions": toolchain.level(),
        "brgemm": brgemm,
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "C++ compiler": _said(lambda: list(ast.literal_eval(toolchain.find_compiler().identity))),
        "ninja": _said(lambda: {"path": toolchain.find_ninja()}),
    }


def _said(find: Callable[[], Any]) -> Any:
    """What is found, or why nothing is."""
    try:
        return find()
    except Exception as error:  # of another package's
        return {"missing": str(error) or type(error).__name__}


def _triton_cache() -> Path:
    return Path(import_module("triton.knobs").cache.dir)


def _folder(place: Callable[[], Path]) -> dict[str, Any]:
    from .. import native

    try:
        path = place()
        if not path.exists():
            return {"path": str(path), "state": "not there yet: made at first need"}
        facts = path.stat()
        distrust = native.distrusted(path)
    except Exception as error:
        return {"missing": str(error)}
    try:
        owner = pwd.getpwuid(facts.st_uid).pw_name
    except KeyError:  # a user that this machine has no name for
        owner = str(facts.st_uid)
    trusted = "no: " + distrust if distrust else "yes"
    return {"path": str(path), "owner": owner, "mode": stat.filemode(facts.st_mode), "trusted": trusted}


def _runs(outlook: Outlook) -> dict[str, dict[str, str]]:
    """The answer of `dispatch.backend` for each device and dtype."""
    import torch

    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return {
        f"{device} {dtype}": _backend(torch.device(device), dtype, outlook) for device in devices for dtype in DTYPES
    }


def _backend(device: torch.device, dtype: str, outlook: Outlook) -> dict[str, str]:
    import torch

    from .. import dispatch

    is_engine = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1" and dtype != "float16"
    if is_engine and outlook.state != "loaded":  # to ask would build it
        return {"backend": "native" if outlook.state == "to build" else "eager", "because": outlook.because}
    choice = dispatch.backend(device, getattr(torch, dtype))
    return {"backend": type(choice).__name__.lower(), "because": choice.because}
