"""Running a script as several processes on this machine, by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

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


def leave() -> NoReturn:
    """Ends a process that has done its work: threads of torch's own may abort it as the interpreter ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
