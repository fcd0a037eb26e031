"""Running a script as several processes on this machine, by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fusedres import plans

ROOT = Path(__file__).parent.parent


def torchrun(processes: int, script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """What came of it, within two minutes; on the CPU, with the engine unless TRITON_INTERPRET is given."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        [*command, str(ROOT / script), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_cases(out: str, every: dict[str, Callable[[DeviceMesh], None]]) -> None:
    """Each case on all processes that torchrun started; what failed anywhere, by case, as JSON. Does not return."""
    torch.set_num_threads(1)
    plans.TOGETHER_UP_TO = 0  # interpreted, narrow layers keep for backward what wider ones do
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    failed: dict[str, str] = {}
    for name, case in every.items():
        try:
            case(mesh)
            failed[name] = ""
        except Exception:
            failed[name] = traceback.format_exc()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failed)
    if dist.get_rank() == 0:
        worst = {name: next((one[name] for one in everyone if one[name]), "") for name in failed}
        Path(out).write_text(json.dumps(worst))
    dist.barrier()
    leave()


def leave() -> NoReturn:
    """Ends a process that has done its work: threads of torch's own may abort it as the interpreter ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
