"""Imports go one way. This list is the drawing in STYLE.md; a file may import only what stands in its row."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).parent.parent

# room -> rooms it may import, besides itself
ARROWS = {
    "requirement": set(),
    "kernels": set(),
    "philox": set(),
    "toolchain": set(),
    "native": {"toolchain"},
    "checks": {"kernels"},
    "assembler": set(),
    "dispatch": {"kernels", "assembler", "native"},
    "measured": {"kernels"},
    "plans": {"kernels", "dispatch", "measured"},
    "recording": {"kernels", "dispatch"},
    "launch": {"kernels", "dispatch", "plans", "recording"},
    "reference": {"kernels", "philox", "checks", "recording", "stack_checks"},
    "ops": {"kernels", "philox", "dispatch", "recording", "reference", "launch"},
    "run_launch": {"kernels", "dispatch"},
    "network_ops": {"kernels", "philox", "dispatch", "recording", "reference", "launch", "run_launch", "ops"},
    "run_ops": {"kernels", "dispatch", "recording", "reference", "run_launch", "ops", "network_ops"},
    "network_checks": {"kernels", "checks"},
    "stack_checks": {"kernels", "checks", "network_checks"},
    "residual_dispatch": {"kernels", "dispatch"},
    "residual_launch": {"kernels", "dispatch", "residual_dispatch"},
    "residual_ops": {"kernels", "dispatch", "reference", "ops", "residual_dispatch", "residual_launch"},
    "explanation": {"kernels", "dispatch", "plans"},
    "plain_layer": {"kernels", "philox", "checks", "dispatch", "ops", "explanation"},
    "functional": {
        "plain_layer",
        "kernels",
        "checks",
        "dispatch",
        "explanation",
        "ops",
        "plans",
        "recording",
        "reference",
        "residual_dispatch",
        "residual_ops",
    },
    "residual": {"checks", "functional"},
    "modules": {"checks", "functional"},
    "mlp": {"checks", "functional", "modules"},
    "fusing": {
        "kernels",
        "checks",
        "dispatch",
        "ops",
        "explanation",
        "functional",
        "reference",
        "modules",
        "mlp",
        "network",
        "network_checks",
        "network_ops",
        "stack",
    },
    "network": {
        "kernels",
        "dispatch",
        "explanation",
        "functional",
        "network_checks",
        "network_ops",
        "ops",
        "reference",
        "run_launch",
        "run_ops",
    },
    "stack": {"kernels", "dispatch", "network", "reference", "stack_checks"},
    "gradients": {"kernels", "recording"},
    "warming": {"dispatch"},
    "parallel": {"kernels", "checks", "ops", "functional", "modules", "stack"},
    "studies": {"functional", "reference", "gradients", "modules", "residual", "stack", "dispatch", "explanation", ""},
    "cli": {
        "requirement",
        "kernels",
        "toolchain",
        "native",
        "dispatch",
        "measured",
        "reference",
        "explanation",
        "functional",
        "gradients",
        "stack",
        "studies",
        "",
    },
    "__main__": {"cli"},
    # fusedres/__init__.py
    "": {
        "requirement",
        "functional",
        "reference",
        "dispatch",
        "explanation",
        "fusing",
        "gradients",
        "mlp",
        "modules",
        "network",
        "residual",
        "stack",
        "warming",
    },
}
# what kernels may import from outside, besides the future
OUTSIDE = {"kernels": {"torch", "triton", "typing", "collections", "functools"}}


def room(path: Path) -> str:
    """The room of a file: its folder or name below fusedres/, or kernels."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        return "kernels"
    return "" if parts[1] == "__init__" else parts[1]


def imported_rooms(source: str, path: Path) -> tuple[set[str], set[str]]:
    """(rooms of this project, packages from outside) that the source imports anywhere."""
    # kernels/ is the package fusedres.kernels, seen through a link
    relative = path.relative_to(ROOT)
    package = ["fusedres", *(relative.parts if relative.parts[0] == "kernels" else relative.parts[1:])][:-1]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" if module == "fusedres" else module for alias in node.names}
    inside = {name for name in names if name.split(".")[0] == "fusedres"}
    rooms = {name.split(".")[1] if "." in name else "" for name in inside}
    rooms = {name if name in ARROWS else "" for name in rooms}  # a name that __init__ exports
    return rooms, {name.split(".")[0] for name in names - inside}


def wrong_imports(source: str, path: Path) -> set[str]:
    here = room(path)
    rooms, outside = imported_rooms(source, path)
    wrong = {f"{here or '__init__'} -> {there or '__init__'}" for there in rooms - ARROWS[here] - {here}}
    if here in OUTSIDE:
        wrong |= {f"{here} -> {there}" for there in outside - OUTSIDE[here] - {"__future__"}}
    return wrong


FILES = sorted(
    [*(ROOT / "kernels").rglob("*.py"), *(p for p in (ROOT / "fusedres").rglob("*.py") if "kernels" not in p.parts)]
)


@pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(ROOT)) for p in FILES])
def test_a_file_imports_only_downwards(path):
    assert room(path) in ARROWS, "a new room: give it its arrows above and in STYLE.md"
    assert not wrong_imports(path.read_text(), path)


@pytest.mark.parametrize(
    ("planted", "where"),
    [
        ("from .modules import FusedResidualLinear", "fusedres/ops.py"),
        ("import fusedres", "kernels/triton/layer.py"),
        ("from ...dispatch import tiles", "kernels/triton/layer.py"),
        ("from fusedres import functional", "fusedres/gradients/readout.py"),
        ("def f():\n    from . import functional", "fusedres/checks.py"),
        ("import json", "kernels/spec.py"),
    ],
)
def test_an_upward_import_is_found(planted, where):
    assert wrong_imports(planted, ROOT / where)


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_a_mutation_breaks_is_there(name):
    assert MUTATIONS[name].right in (ROOT / MUTATIONS[name].file).read_text()


def test_nothing_imports_a_package_called_kernels():
    """Another library owns that name at the top level."""
    for path in [*FILES, *(ROOT / "bench").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == "kernels" for name in names), path
