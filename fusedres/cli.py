"""The command line: `python -m fusedres demo`, `study` and `build`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's own; the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parse(arguments)
    return options.command(options, arguments)


def _build(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    from . import native, toolchain

    try:
        for level in toolchain.accepted_levels() if options.all_levels else [toolchain.level()]:
            begin = time.perf_counter()
            path = native.build(level)
            print(f"{path}  {time.perf_counter() - begin:.1f} s", flush=True)
    except toolchain.Unavailable as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _study(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    device = _device(options)
    if device is None:
        return 2
    if device == "cuda":
        _set_interpreter(False, arguments)

    import torch

    from .studies import depth

    try:
        return depth.run(options.out, options.steps, options.seeds, torch.device(device))
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2


def _device(options: argparse.Namespace) -> str | None:
    """Where to run; None, after a line that says so, where that is not there."""
    import torch

    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        print("--device cuda: torch sees no CUDA device here", file=sys.stderr)
        return None
    return options.device or ("cuda" if has_gpu else "cpu")


def _demo(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    device = _device(options)
    if device is None:
        return 2
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        from . import native

        _set_interpreter(native.missing() is not None, arguments)
    elif device == "cuda":
        _set_interpreter(False, arguments)

    import torch

    from .studies import demo

    try:
        return demo.run(options.out, options.epochs, options.seed, torch.device(device))
    except ImportError as error:
        print(error, file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    from . import __version__

    parser = argparse.ArgumentParser("fusedres", description="Fused residual layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fusedres {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    build = commands.add_parser("build", help="build the CPU kernels, which else the first call does")
    build.set_defaults(command=_build)
    build.add_argument(
        "--all-levels",
        action="store_true",
        help="for every instruction set the compiler knows, whatever this machine can run [the machine's own]",
    )
    demo = commands.add_parser("demo", help="compare fused and eager gradients, train a classifier both ways")
    demo.set_defaults(command=_demo)
    demo.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("fusedres-demo"),
        help="folder for pictures and data [%(default)s]",
    )
    demo.add_argument("--epochs", metavar="N", type=_positive, default=5, help="epochs of training [%(default)s]")
    demo.add_argument("--seed", metavar="S", type=int, default=0, help="seed of every draw [%(default)s]")
    demo.add_argument("--device", choices=("cpu", "cuda"), help="where to run [a GPU where there is one]")
    study = commands.add_parser("study", help="a write-up's claim, measured: a table, a picture, a verdict")
    study.set_defaults(command=_study)
    study.add_argument("name", choices=("depth",), help="depth: 20, 56 and 1000 layers on digits, plain and residual")
    study.add_argument("--steps", metavar="N", type=_positive, default=600, help="of each training [%(default)s]")
    study.add_argument("--seeds", metavar="N", type=_positive, default=3, help="trainings of each [%(default)s]")
    study.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=Path("fusedres-study"),
        help="folder for the picture and the data [%(default)s]",
    )
    study.add_argument("--device", choices=("cpu", "cuda"), help="where to run [a GPU where there is one]")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _set_interpreter(is_wanted: bool, arguments: Sequence[str]) -> None:
    """Has Triton interpret kernels, or compile them. It decides as it is imported: where it has been, start anew."""
    if is_wanted == (os.environ.get("TRITON_INTERPRET") == "1"):
        return
    os.environ["TRITON_INTERPRET"] = "1" if is_wanted else "0"
    if "triton" in sys.modules:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "fusedres", *arguments])
