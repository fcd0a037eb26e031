"""The command line: `python -m fusedres demo`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line, by default the process's own; the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parse(arguments)

    import torch

    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        print("--device cuda: torch sees no CUDA device here", file=sys.stderr)
        return 2
    device = options.device or ("cuda" if has_gpu else "cpu")
    _set_interpreter(device == "cpu", arguments)

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
    demo = commands.add_parser("demo", help="compare fused and eager gradients, train a classifier both ways")
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
