"""Breaks of `fusing` and `mlp`, for tests/mutations.py: (file, right, wrong, tests)."""

FUSING = {
    "fusing: a projection of another x": (
        "patterns.py",
        "if x is match.x and shape_of(weight) == shape:",
        "if shape_of(weight) == shape:",
        "test_fuse.py -k projection",
    ),
    "fusing: moved past an operation in place": (
        "patterns.py",
        "lambda one: admits(one) and _is_safe(one, place)",
        "admits",
        "test_fuse_left.py -k shared",
    ),
    "fusing: activations that only look alike": ("regions.py", "_SAME = 1e-12", "_SAME = 1e-2", "test_fuse.py -k gelu"),
    "fusing: values that others read too": (
        "regions.py",
        "if not _is_left_by(node, z, values):",
        "if False:",
        "test_fuse_left.py -k shared",
    ),
    "fusing: sign of a difference": (
        "patterns.py",
        "(branch_scale, -1.0) if is_minuend",
        "(branch_scale, 1.0) if is_minuend",
        "test_fuse.py -k minus",
    ),
    "fusing: all dropout removed": (
        "rewriting.py",
        '(trains is False or given["p"] == 0)',
        "True",
        "test_fuse.py -k dropout",
    ),
    "fusing: attributes unwatched": (
        "watch.py",
        'if name not in _EVERY_MODULES and name != "_fused_plans":',
        "if False:",
    ),
    "fusing: replaced modules unseen": ("watch.py", "[self._stands(module, path) for path in links]", "[]"),
    "fusing: hooks of parts ignored": (
        "watch.py",
        "if not self._is_busy():",
        "if True:",
        "test_fuse_left.py -k later",
    ),
    "fusing: replicas with the first one's parameters": (
        "plans.py",
        "if self.module() is not module:",
        "if False:",
        "test_fuse_tools.py -k replicas",
    ),
    "fusing: copies with the first one's plans": (
        "plans.py",
        "return _fresh, (self.takes_childrens,)",
        "return (lambda plans: plans), (self,)",
        "test_fuse_tools.py -k copies",
    ),
    "fusing: a lost parameter raises": (
        "plans.py",
        "except KeyError:\n            return None",
        "except IndexError:\n            return None",
        "test_fuse_tools.py -k parametrized",
    ),
    "fusing: changed attributes stay changed": (
        "undone.py",
        "now[name] = attributes[name]",
        "pass",
        "test_fuse_left.py -k cannot_show",
    ),
    "fusing: random states stay drawn": (
        "undone.py",
        "random.setstate(self.chance[0])",
        "pass",
        "test_fuse_left.py -k cannot_show",
    ),
    "fusing: blocks without gradients unseen": (
        "stand_ins.py",
        'if "set_" in name:',
        "if False:",
        "test_fuse_left.py -k cannot_show",
    ),
    "fusing: other threads recorded": (
        "tracing.py",
        "if threading.get_ident() != here:",
        "if False:",
        "test_fuse_tools.py -k threads",
    ),
    "fusing: operands that do not fit raise": (
        "calls.py",
        "except (TypeError, ValueError, NotImplementedError):",
        "except ArithmeticError:",
        "test_fuse.py -k operands",
    ),
    "fusing: compiled with what was recorded": (
        "swapping.py",
        "if torch.compiler.is_compiling() or torch.jit.is_tracing():",
        "if False:",
        "test_fuse_tools.py -k looks_at",
    ),
    "backend: layers under autocast": (
        "backend.py",
        "if names & _AUTOCAST or dispatch.is_any_autocast_enabled():",
        "if False:",
        "test_backend.py -k autocast",
    ),
    "backend: a residual of any shape": (
        "backend.py",
        "if isinstance(choice, dispatch.Eager) or not _is_of_rows(match):",
        "if isinstance(choice, dispatch.Eager):",
        "test_backend.py -k untouched",
    ),
    "backend: failures raised": (
        "backend.py",
        "        except Exception as error:\n            what",
        "        except ArithmeticError as error:\n            what",
        "test_backend.py -k fails",
    ),
}
