"""Code that a recording would misjudge, refused before it runs: by what its instructions do, and by what it calls.

A recording runs an author's code once and keeps what that did to tensors. Whatever else code does would be lost, or
done at the wrong time; whatever it asks that only a call can answer would be answered for good.
"""

from __future__ import annotations

import builtins
import dis
import gc
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from torch import nn

from .values import EVERY_MODULES, Untraceable, contents, is_constant, of_class

_STORES = ("STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL", "STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE")
_CATCHES = ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH", "CHECK_EG_MATCH")
_IS_BY_TABLE = sys.version_info >= (3, 11)  # a bare except has no instruction of its own then
_ENTERS = ("BEFORE_WITH", "SETUP_WITH", "BEFORE_ASYNC_WITH", "LOAD_SPECIAL")
_NAMES = {"type", "id", "vars", "locals", "globals", "eval", "exec", "open", "input", "setattr", "delattr"}
_BUILTINS = {builtins.hasattr, builtins.getattr, builtins.print, builtins.callable, builtins.issubclass, builtins.id}
_TELLING = {"logging", "warnings"}
_FROM_TORCH = {
    ("torch", "is_tensor"): "asks what a value is that only a call decides",
    ("torch.autograd.function", "apply"): "calls an autograd.Function, whose backward a recording does not see",
    ("torch.utils.checkpoint", "checkpoint"): "checkpoints a part of itself",
}
# whose author says what it does: nothing, but where it checkpoints, which a fused class still does
_TRUSTED = {("transformers.modeling_layers", "forward_with_checkpointing")}


class Scrutiny:
    """Looks at everything that is called in this thread while it is installed, and raises Untraceable.

    names: all that the code which was run through names, attributes among them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names: set[str] = set()
        self.asks_isinstance = False
        self._seen: set[CodeType] = set()
        self._importing: FrameType | None = None
        self.run: dict[str, nn.Module] = {}  # by path those whose forward was run, called or not
        self._paths = {part: path for path, part in module.named_modules()}
        self._touched: set[str] = set()  # what code names that changes something, and is a child's
        self._own = [
            (part, name, value) for part in self._paths for name, value in (of_class(part) | vars(part)).items()
        ]
        self._may_change = {
            name: f"{type(part).__name__}.{name}"
            for part, name, value in self._own
            if name not in EVERY_MODULES
            and not (is_constant(value) or isinstance(value, nn.Module) or contents(value) is not None)
        }

    @contextmanager
    def installed(self) -> Iterator[None]:
        before, collects = sys.getprofile(), gc.isenabled()
        gc.disable()  # whose finalisers are nobody's forward
        self.install()
        try:
            yield
        finally:
            sys.setprofile(before)
            if collects:
                gc.enable()

    def install(self) -> None:
        """Also after it has raised: Python takes a profiler that raises away."""
        self.asks_isinstance, self._importing = False, None
        sys.setprofile(self._look)

    def _look(self, frame: FrameType, event: str, arg: Any) -> None:
        if self._importing is not None:
            self._importing = None if event == "return" and frame is self._importing else self._importing
        elif event == "call" and frame.f_code.co_name == "_find_and_load":
            self._importing = frame  # what a module does as it is imported is not done by the forward
        elif event == "call":
            self._look_at_code(frame)
        elif event == "c_call":
            if not _is_insiders(frame):
                self._look_at_builtin(arg)
        else:
            self.asks_isinstance = False

    def _look_at_code(self, frame: FrameType) -> None:
        code, name = frame.f_code, frame.f_globals.get("__name__", "")
        if code.co_name == "forward" and issubclass(type(part := frame.f_locals.get("self")), nn.Module):
            self.run |= {self._paths[part]: part} if part in self._paths else {}
        if name.partition(".")[0] in _TELLING and frame.f_back is not None and not _is_insiders(frame.f_back):
            raise Untraceable("its forward warns or logs")
        if reason := _FROM_TORCH.get((name, code.co_name)):
            raise Untraceable(f"its forward {reason}")
        if code in self._seen or _is_insiders(frame) or (name, code.co_name) in _TRUSTED:
            return
        self._seen.add(code)
        if changing := sorted(self._may_change[one] for one in self._may_change.keys() & set(code.co_names)):
            raise Untraceable(f"its forward reads {changing[0]}, an object that may change inside")
        if reason := _why_refused(code):
            if any(_stores(one, code) for one in dis.get_instructions(code)):
                self._touched.update(code.co_names)
            raise Untraceable(f"its forward {reason}, in {code.co_name}")
        self.names.update(code.co_names)

    def check(self) -> None:
        """Raises Untraceable where code was run through that names what a child, called as it is, may change."""
        held = {id(value) for _, name, value in self._own if name in self._touched and contents(value) is not None}
        shared = {name for _, name, value in self._own if id(value) in held}
        options = {name for _, name, _ in self._own if name not in EVERY_MODULES}
        if names := sorted(self.names & options & (self._touched | shared)):
            raise Untraceable(f"its forward reads {names[0]}, which a child of it may change")

    def _look_at_builtin(self, called: Any) -> None:
        if called is builtins.isinstance:
            self.asks_isinstance = True
        elif isinstance(getattr(called, "__self__", None), random.Random):
            raise Untraceable("its forward draws from random")
        elif getattr(called, "__name__", "") in {one.__name__ for one in _BUILTINS} and called in _BUILTINS:
            raise Untraceable(f"its forward calls {called.__name__}")


def _is_insiders(frame: FrameType) -> bool:
    """Whether a frame is of code that is not to be looked at: torch's, Python's own, and this room's."""
    name = frame.f_globals.get("__name__", "")
    root = name.partition(".")[0]
    return root == "torch" or name.startswith("fusedres.fusing") or root in sys.stdlib_module_names


def _stores(one: dis.Instruction, code: CodeType) -> bool:
    return one.opname in _STORES or (one.opname == "STORE_DEREF" and one.argval in code.co_freevars)


def _why_refused(code: CodeType) -> str | None:
    last, before = None, ""
    for one in dis.get_instructions(code):
        if _stores(one, code):
            return "changes what outlives a call, or a part of something"
        if one.opname in _ENTERS:
            return "enters a context"
        is_bare = before == "PUSH_EXC_INFO" if _IS_BY_TABLE else one.opname == "POP_EXCEPT"
        if one.opname in _CATCHES or (is_bare and one.opname in ("POP_TOP", "POP_EXCEPT")):
            return "catches exceptions"
        if one.argval == "__dict__":
            return "reads __dict__"
        if one.opname == "MATCH_CLASS" or (one.opname == "IS_OP" and last is not None):
            return "asks what a value is"
        if one.opname in ("LOAD_GLOBAL", "LOAD_NAME") and one.argval in _NAMES:
            return f"calls {one.argval}"
        before = one.opname
        last = one.argval if one.opname == "LOAD_CONST" else code  # None before `is`: whether a value is there
    return None
