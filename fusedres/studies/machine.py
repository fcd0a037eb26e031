"""What figures have to be read with: the machine, versions, the commit, the date."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch


def facts() -> dict[str, str | float]:
    """Of this machine and this moment."""
    return {
        "cpu": cpu_name(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 0,
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2),
        "date": now(),
    }


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the tree that this file is of: git's, else the variable COMMIT, for a copy without its history."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    is_tracked = said([*git, "ls-files", here.name])  # an installed package may lie within another project's tree
    return (is_tracked and said([*git, "rev-parse", "HEAD"])) or os.environ.get("COMMIT") or "unknown"


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def said(command: list[str]) -> str:
    """What a command prints; nothing where it fails or is not there."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
