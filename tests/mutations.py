"""Does the suite bite? Break the code in one place at a time, in a copy, and see the tests fail.

python tests/mutations.py [NAME ...]     exits 1 if a broken copy passes
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from mutations_fusing import FUSING

ROOT = Path(__file__).parent.parent


CPU = "test_cpu.py test_exact.py -k cpu"
STACK = "test_stack_kernels.py"
DESCRIBED = "test_persistent.py"
WEIGHT = "test_weight_gradient.py"
NARROW = "kernels/triton/layer_narrow.py"
COMPILERS, TRAINING = "test_tools_compilers.py", "test_tools_training.py"
SHARDING, STYLES = "fusedres/parallel/sharding.py", "fusedres/parallel/styles.py"
DIVIDED = "test_distributed_tensors.py -k train and 2"
SUM = "test_residual.py -k not compiled and not opcheck"


class Mutation(NamedTuple):
    file: str
    right: str
    wrong: str
    tests: str = "test_layer.py"


MUTATIONS = {
    "GELU constant off in the fifth digit": Mutation(
        "kernels/triton/activations.py",
        "INV_SQRT_2 = tl.constexpr(0.7071067811865476)",
        "INV_SQRT_2 = tl.constexpr(0.7071)",
    ),
    "tanh-GELU constant off": Mutation("kernels/triton/activations.py", "(0.044715)", "(0.0447)"),
    "GELU slope off": Mutation("kernels/triton/activations.py", "tl.exp(-0.5 * z * z)", "tl.exp(-0.501 * z * z)"),
    "SiLU slope off": Mutation("kernels/triton/activations.py", "s * (1 + z * (1 - s))", "s * (1 + z * (1 - s * s))"),
    "ReLU drops NaN": Mutation(
        "kernels/triton/activations.py",
        "tl.where(z < 0, 0.0, z)",
        "tl.where(z > 0, z, 0.0)",
        "test_layer.py test_activations.py",
    ),
    "K mask off by one": Mutation("kernels/triton/tile.py", "in_k = k < K - k0", "in_k = k < K - k0 - 1"),
    "K mask missing": Mutation("kernels/triton/tile.py", "in_k = k < K - k0", "in_k = k < K"),
    "last column unwritten": Mutation("kernels/triton/tile.py", "m < M, n < N\n", "m < M, n < N - 1\n"),
    "last row unwritten": Mutation("kernels/triton/tile.py", "m < M, n < N\n", "m < M - 1, n < N\n"),
    "fp16 accumulation": Mutation(
        "kernels/triton/tile.py",
        "total = tl.dot(a, b, total, input_precision=PRECISION)",
        "total = tl.dot(a, b, total, input_precision=PRECISION).to(tl.float16).to(tl.float32)",
        "test_layer.py -k float16",
    ),
    "transposed incoming gradient ignored": Mutation(
        "kernels/triton/layer_backward.py", "g, x = rows(g), rows(x)", "x = rows(x)"
    ),
    "strided bias ignored": Mutation(
        "kernels/triton/layer.py", "b, c, a = vector(b), vector(c), vector(a)\n", "pass\n"
    ),
    "32-bit row offsets": Mutation(
        "kernels/triton/tile.py", "tl.cdiv(N, BLOCK_N)).to(tl.int64)", "tl.cdiv(N, BLOCK_N))"
    ),
    "skip scale missing in dx": Mutation(
        "kernels/triton/layer_backward.py",
        "skip = scale(lam_ptr, lam) * load(",
        "skip = load(",
    ),
    "dλ sums the branch": Mutation("kernels/triton/layer_backward.py", "in_n, g * s)", "in_n, g * g)"),
    "a row tile lost from db": Mutation(
        "kernels/triton/sums.py", "(r < rows - r0)", "(r < rows - r0 - 1)", "test_layer.py"
    ),
    "post slope at z": Mutation("kernels/triton/layer.py", "g *= slope(v, ACTIVATION)", "g *= slope(z, ACTIVATION)"),
    "backward drops other rows": Mutation(
        "kernels/triton/layer.py",
        "gb = drop_rows(g, m, seed",
        "gb = drop_rows(g, m + 1, seed",
        "test_layer.py -k stochastic",
    ),
    "φ' of a dropped row counts": Mutation(
        "kernels/triton/layer.py",
        "drop_rows(kept_slope, m, seed, threshold, 1.0) if DROPS else kept_slope",
        "kept_slope",
        "test_layer.py -k dropped",
    ),
    "descriptors: parts of a tile change places": Mutation(
        "kernels/triton/layer_persistent.py", "left if part == 0 else right", "right if part == 0 else left", DESCRIBED
    ),
    "descriptors: quarters change places": Mutation(
        "kernels/triton/layer_persistent.py", "left if part < 2 else right", "left if part < 3 else right", DESCRIBED
    ),
    "descriptors: the last group of tiles as high as others": Mutation(
        "kernels/triton/layer_persistent.py", "tl.minimum(down - first, GROUP)", "GROUP", DESCRIBED
    ),
    "descriptors: the skip of another part": Mutation(
        "kernels/triton/layer_persistent.py", "r.load([m0, at]),\n", "r.load([m0, n0]),\n", DESCRIBED
    ),
    "inside: every tile of rows leaves its sums in one row": Mutation(
        "kernels/triton/layer_backward_inside.py",
        "tl.cast(m0 // BLOCK_M, tl.int64) * N",
        "tl.cast(0, tl.int64)",
        DESCRIBED,
    ),
    "inside: post skip without its slope": Mutation(
        "kernels/triton/layer_backward_inside.py", "ds *= kept_skip.load", "kept_skip.load", DESCRIBED
    ),
    "launching: any address": Mutation(
        "kernels/triton/launching.py", "value.data_ptr() % 16 == 0", "True", "test_launching.py"
    ),
    "launching: any seed": Mutation(
        "kernels/triton/launching.py", "append(-(2**31) <= value < 2**31)", "append(True)", "test_launching.py"
    ),
    "launching: any stride": Mutation(
        "kernels/triton/launching.py", "key += (value == 1, value % 16 == 0)", "pass", "test_launching.py"
    ),
    "launching: any device": Mutation(
        "kernels/triton/launching.py", "[id(kernel), device]", "[id(kernel)]", "test_launching.py"
    ),
    "launching: descriptors of any dtype": Mutation(
        "kernels/triton/launching.py", "(kind, value.base.dtype, ", "(kind, ", "test_launching.py"
    ),
    "launching: any dtype": Mutation(
        "kernels/triton/launching.py", "(value.dtype, value", "(value", "test_launching.py"
    ),
    "launching: constants not told apart": Mutation(
        "kernels/triton/launching.py", "    key += compiled_for.values()\n", "", "test_launching.py"
    ),
    "plans: a measured form that does not fit": Mutation(
        "fusedres/plans.py", "refused := why_not(facts, form)", 'refused := ""', "test_plans.py"
    ),
    "plans: one tile inside for layers that do more": Mutation(
        "fusedres/plans.py", 'INSIDE_BUSY if facts.work == "busy" else inside', "inside", "test_plans.py"
    ),
    "plans: a file is read while compiling": Mutation(
        "fusedres/functional.py", " and not torch.compiler.is_compiling() and plans", " and plans", "test_plans.py"
    ),
    "plans: eager measured on plain layers for any": Mutation(
        "fusedres/plans.py",
        "if is_scaled or not is_plain or",
        "if",
        "test_plans.py",
    ),
    "plans: eager in training measured by calls": Mutation(
        "fusedres/plans.py", '"training" if trains else "forward"', '"forward"', "test_plans.py"
    ),
    "plans: the copy engine takes any first byte": Mutation(
        "fusedres/plans.py", " and t.data_ptr() % 16 == 0", "", "test_plans.py"
    ),
    "lazy negation ignored": Mutation("fusedres/launch.py", "not t.is_neg() else", "True else"),
    "Philox key schedule": Mutation("fusedres/philox.py", "0xBB67AE85", "0xBB67AE84", "test_philox.py"),
    "kernel Philox counter": Mutation(
        "kernels/triton/philox.py", "low = (m & 0xFFFFFFFF)", "low = ((m + 1) & 0xFFFFFFFF)", "test_philox.py"
    ),
    "C++: sums as deep as the layer": Mutation(
        "kernels/cpu/product.h", "constexpr int64_t SUMMED = 512", "constexpr int64_t SUMMED = 1 << 20", CPU
    ),
    "C++: last columns of the engine's own product": Mutation(
        "kernels/cpu/product.h", "n < N ? B[(k0 + k)", "n < N - 1 ? B[(k0 + k)", CPU
    ),
    "C++: last column of a panel unwritten": Mutation(
        "kernels/cpu/panel.h",
        "finish_panel(ready, rows, panel, n, width, z, width)",
        "finish_panel(ready, rows, panel, n, width - (width % 2), z, width)",
        CPU,
    ),
    "C++: last of four lanes' features": Mutation(
        "kernels/cpu/lanes.h", "if (N - n == 3) some", "if (false) some", CPU
    ),
    "C++: tail of a dot product": Mutation("kernels/cpu/dots.h", "of[j] + k, K - k)", "of[j] + k, K - k - 1)", CPU),
    "C++: padded rows not zeroed": Mutation(
        "kernels/cpu/panel.h", "std::fill(panel + rows.count * ld, panel + rows.padded * ld, T{});", "", CPU
    ),
    "C++: padded lanes not zeroed": Mutation(
        "kernels/cpu/lanes.h", "if (count < R) std::fill(", "if (false) std::fill(", CPU
    ),
    "C++: column of padding not zeroed": Mutation("kernels/cpu/panel.h", "panel[r * ld + columns] = T{};", ";", CPU),
    "C++: λ ignored in dx": Mutation("kernels/cpu/panel.h", "dh[n] = lambda * g[n];", "dh[n] = g[n];", CPU),
    "C++: λ ignored in dx of lanes": Mutation(
        "kernels/cpu/lanes_backward.h", "store(dh + i, lambda * gradient)", "store(dh + i, gradient)", CPU
    ),
    "C++: drop mask inverted": Mutation("kernels/cpu/philox.h", ">= drop_threshold", "< drop_threshold", CPU),
    "C++: db of dropped rows": Mutation(
        "kernels/cpu/panel.h", "dz[n] = T{}, dh[n] =", "dz[n] = T{}, dbias[n] += scale[n] * g[n], dh[n] =", CPU
    ),
    "C++: db of dropped rows of lanes": Mutation(
        "kernels/cpu/lanes_backward.h", "total += lane;", "total += scale * gradient;", CPU + " -k drop"
    ),
    "C++: rows of a slice dropped from its first": Mutation(
        "kernels/cpu/layers.h", "some.first_row = call.first_row + first", "some.first_row = call.first_row", CPU
    ),
    "C++: threads' sums added once": Mutation(
        "kernels/cpu/gradients.h", "t < size_t(team.members)", "t < size_t(team.members > 2)", CPU
    ),
    "C++: lanes' sums of one thread": Mutation(
        "kernels/cpu/lanes_backward.h",
        "int t = 0; t < team.members; t++) total += from",
        "int t = 0; t < 1; t++) total += from",
        CPU,
    ),
    "C++: lanes' matrices of one thread": Mutation(
        "kernels/cpu/lanes_backward.h", "for (int t = 1; t < team.members; t++) {", "for (int t = 1; t < 1; t++) {", CPU
    ),
    "C++: lanes' matrices of the last block": Mutation("kernels/cpu/lanes_backward.h", "!sums.is_empty", "false", CPU),
    "C++: wide layers' sums of one thread": Mutation(
        "kernels/cpu/layers.h", "for (size_t t = 1; t < state.sums.size(); t++)", "for (size_t t = 1; t < 1; t++)", CPU
    ),
    "C++: wrong slice of a stacked parameter": Mutation(
        "kernels/cpu/tensors.h",
        "numbers.storage_offset() + index * size",
        "numbers.storage_offset()",
        "test_network.py",
    ),
    "C++: wrong slice of a stacked gradient": Mutation(
        "kernels/cpu/tensors.h",
        "to.mutable_data_ptr()) + index * size",
        "to.mutable_data_ptr()) + (index / 2) * size",
        "test_network.py",
    ),
    "stack: λ of the layer before": Mutation(
        "kernels/triton/stack_backward.py", "of_layer(lam_ptr, lam, layer)", "of_layer(lam_ptr, lam, layer - 1)", STACK
    ),
    "stack: dλ sums the branch": Mutation(
        "kernels/triton/stack_backward.py", "g * h.to(tl.float32), is_later", "g * g, is_later", STACK
    ),
    "stack: first layer lost": Mutation("kernels/triton/stack.py", "in range(L):", "in range(1, L):", STACK),
    "stack: last layer lost in backward": Mutation(
        "kernels/triton/stack_backward.py", "layer = last - 1 - back", "layer = tl.maximum(last - 2 - back, 0)", STACK
    ),
    "stack: dropped rows unscaled": Mutation(
        "kernels/triton/stack.py", "threshold, of_layer(keep_scale_ptr, keep_scale, layer)", "threshold, 1.0", STACK
    ),
    "stack: rows' last column masked": Mutation("kernels/triton/stack.py", "n < WIDTH", "n < WIDTH - 1", STACK),
    "stack: padded columns unmasked": Mutation(
        "kernels/triton/stack.py", "if tile.shape[1] == WIDTH:", "if True:", STACK
    ),
    "stack: rows outside M in sums": Mutation(
        "kernels/triton/stack_backward.py",
        "return tl.where(in_tile, ds, 0.0)",
        "return ds + tl.where(in_tile, 0.0, 1.0)",
        STACK,
    ),
    "stack: a program's earlier tiles lost": Mutation(
        "kernels/triton/stack_backward.py", "mask=mask & is_later", "mask=mask & False", STACK
    ),
    "stack: sums begin with what was there": Mutation(
        "kernels/triton/stack_backward.py", "tile >= programs, dz_size", "tile >= 0, dz_size", STACK
    ),
    "stack: kept one layer late": Mutation(
        "kernels/triton/stack.py", "layer % every == 0", "layer % every == 1", STACK
    ),
    "stack: 32-bit offsets of kept rows": Mutation(
        "kernels/triton/stack.py", "size = tl.cast(M, tl.int64) * WIDTH", "size = M * WIDTH", STACK + " -k beyond"
    ),
    "stack: g handed on in x's type": Mutation(
        "kernels/triton/stack_backward.py",
        "torch.float32 if first > 0 else x.dtype",
        "x.dtype",
        STACK + " -k bits_of_what",
    ),
    "stack: products read rows of the layer before": Mutation(
        "kernels/triton/stack.py",
        "store(y_ptr, WIDTH, m, n, in_m, in_n, h)\n            tl",
        "store(y_ptr, WIDTH, m, n, in_m & (layer == 0), in_n, h)\n            tl",
        STACK,
    ),
    "stack: dz of the wrong layer from memory": Mutation(
        "kernels/triton/stack_backward.py",
        "product_from_memory(dz_ptr, WIDTH",
        "product_from_memory(dz_ptr - layer * dz_size, WIDTH",
        STACK,
    ),
    "stack: from memory, what is not kept is not filled": Mutation(
        "kernels/triton/stack_backward.py", "(not reads_memory and (", "(True and (", STACK
    ),
    "stack: wide layers of any number of rows": Mutation(
        "fusedres/dispatch.py", "and rows <= STACK_FEW_ROWS", "and rows >= 0", "test_runs.py -k many_rows"
    ),
    "stack: wide layers one by one or not, whatever is promised of bits": Mutation(
        "fusedres/dispatch.py", "not is_batch_invariant() and rows", "rows", "test_runs.py -k batch_invariance"
    ),
    "stack: post slope at z": Mutation(
        "kernels/triton/stack_backward.py", "g *= slope(v, ACTIVATION)", "g *= slope(z, ACTIVATION)", STACK
    ),
    "stack: a tile that drops all rows multiplies": Mutation(
        "kernels/triton/stack_backward.py", "turns = keeps_any(m, in_m, seed, threshold)", "turns = 1", STACK
    ),
    "C++: odd depth of bfloat16 pairs": Mutation("kernels/cpu/product.h", "k < K ? W[n * ld + k] : T{}", "T{}", CPU),
    "C++: GELU off in the fifth digit": Mutation("kernels/cpu/activations.h", "8.827535014e-1f", "8.8276e-1f", CPU),
    "C++: Philox round lost": Mutation("kernels/cpu/philox.h", "round < 10", "round < 9", CPU),
    "C++: bias ignored where strided": Mutation("kernels/cpu/tensors.h", "!found->is_contiguous() ||", "", CPU),
    "C++: sign of a lazily negated parameter": Mutation(
        "kernels/cpu/tensors.h", "|| found->is_neg()", "", "test_network.py"
    ),
    "C++: sign of a lazily negated x": Mutation(
        "kernels/cpu/tensors.h", "given.is_neg() ? given.resolve_neg() : given", "given", "test_network.py"
    ),
    "C++: gradients that nobody asked for": Mutation(
        "kernels/cpu/node.h", "context->needs_input_grad(1 + i)", "true", "test_network_autograd.py"
    ),
    "C++: memory laid out for what backward wants": Mutation(
        "kernels/cpu/node.h", "saved[KEPT], required, g", "saved[KEPT], wanted, g", "test_network_autograd.py"
    ),
    "C++: memory kept without gradients": Mutation(
        "kernels/cpu/binding.cpp", "c10::GradMode::is_enabled() &&", "true ||", "test_network_autograd.py"
    ),
    "C++: backward not differentiable": Mutation(
        "kernels/cpu/node.h", "c10::GradMode::is_enabled() || ", "", "test_network_autograd.py"
    ),
    "C++: third derivative of gelu off": Mutation(
        "kernels/cpu/derivatives.h", "(xx - 4) * e", "(xx - 3) * e", "test_smooth.py"
    ),
    "C++: a factor's gradient without the others": Mutation(
        "kernels/cpu/derivatives.h", "own, true, j);", "own, true, 0);", "test_smooth.py"
    ),
    "C++: rows counted by a layer's own width": Mutation(
        "kernels/cpu/tensors.h",
        "drops_all(layer, M);",
        "drops_all(layer, x.numel() / layer.K);",
        "test_stack_changes.py",
    ),
    "C++: gradients of a dropped layer unwritten": Mutation(
        "kernels/cpu/tensors.h", "clear_gradients(layer);", ";", "test_stack.py -k drops"
    ),
    "C++: a dropped layer's weights multiplied forward": Mutation(
        "kernels/cpu/dots.h",
        "if (layer.is_dropped)\n                std",
        "if (false)\n                std",
        "test_stack.py -k drop",
    ),
    "C++: a dropped layer's weights multiplied backward": Mutation(
        "kernels/cpu/layers.h", "end, layer.is_dropped", "end, false", "test_stack.py -k drop"
    ),
    "stack: draws projections before layers": Mutation(
        "fusedres/stack/module.py",
        "        self.layers = StackLayers()\n",
        "        self.layers = StackLayers()\n        torch.rand(1)\n",
        "test_stack_names.py -k draws",
    ),
    "stack: inputs of a differentiated backward not apart": Mutation(
        "fusedres/reference.py",
        "[t.view_as(t) if is_wanted else t for",
        "[t if is_wanted else t for",
        "test_stack_changes.py",
    ),
    "check: third digit of GELU unseen": Mutation(
        "kernels/cpu/activations.h", "8.827535014e-1f", "8.83e-1f", "test_cli_check.py -k test_check"
    ),
    "check: what raises has held": Mutation(
        "fusedres/cli/selftest.py", 'what, not wrong, f"', 'what, True, f"', "test_cli_check.py"
    ),
    "compare: a unit of one rounding": Mutation(
        "fusedres/gradients/verdict.py", "worst / max(worst_of_eager, floor)", "worst / floor", "test_compare.py"
    ),
    "compare: a unit of nothing": Mutation(
        "fusedres/gradients/verdict.py",
        "rms / max(rms_of_eager, 0.29 * floor)",
        "rms / max(rms_of_eager, 1e-300)",
        "test_compare.py",
    ),
    "compare: no rms": Mutation(
        "fusedres/gradients/verdict.py", "errors.numbers >= FEW and", "False and", "test_compare.py"
    ),
    "compare: luck of eager's everywhere": Mutation(
        "fusedres/gradients/verdict.py", "if roundings <= self.roundings:", "if False:", "test_compare.py"
    ),
    "compare: a truth of nothing has no rounding": Mutation(
        "fusedres/gradients/verdict.py", " if largest > 0 else torch.finfo(torch.float64).eps)", ")", "test_compare.py"
    ),
    "compare: what is not finite differs from nothing": Mutation(
        "fusedres/gradients/verdict.py",
        "if not (math.isfinite(absolute) and math.isfinite(largest)):",
        "if False:",
        "test_compare.py",
    ),
    "compare: the last layer's verdict for all": Mutation(
        "fusedres/gradients/compare.py",
        "all(layer.verdict == AGREES for layer in self.layers.values())",
        "list(self.layers.values())[-1].verdict == AGREES",
        "test_compare.py",
    ),
    "compare: a truth that draws other numbers": Mutation(
        "fusedres/gradients/truth.py", "> allowed:", "> math.inf:", "test_compare.py"
    ),
    "compare: a float64 copy of float32 numbers": Mutation(
        "fusedres/gradients/truth.py", "deepcopy(eager).double()", "deepcopy(eager)", "test_compare.py"
    ),
    "command line: a verdict of 0 always": Mutation(
        "fusedres/cli/compare.py", "Answer(comparison.exit_code,", "Answer(0,", "test_cli.py test_cli_models.py"
    ),
    "command line: notes beside the JSON": Mutation(
        "fusedres/cli/__init__.py", "if options.json else nullcontext()", "if False else nullcontext()", "test_cli.py"
    ),
    "C++: backward hidden from modes": Mutation(
        "kernels/cpu/node.h", "is_plain(g) && is_plain(x);", "true;", "test_network_autograd.py"
    ),
    "C++: a residual that is read let go": Mutation(
        "kernels/cpu/node.h", "residual && reads_residual(run.plan) ?", "false ?", "test_plain_layer.py"
    ),
    "C++: a residual that is not read kept": Mutation(
        "kernels/cpu/node.h", "residual && reads_residual(run.plan) ?", "residual ?", "test_plain_layer.py"
    ),
    "C++: a residual's gradient without λ": Mutation(
        "kernels/cpu/node.h", "scale == 1 ? g : at::mul(g, scale)", "g", "test_plain_layer.py"
    ),
    "C++: a residual of other leading sizes": Mutation(
        "kernels/cpu/tensors.h", "residual_->dim() == x_.dim() &&", "", "test_plain_layer.py"
    ),
    "a plain layer: known without its options": Mutation(
        "fusedres/plain_layer.py", "            options,\n            skip", "            skip", "test_plain_layer.py"
    ),
    "a plain layer: known without its weight's shape": Mutation(
        "fusedres/plain_layer.py", "            weight.shape,\n", "", "test_plain_layer.py"
    ),
    "a plain layer: True for 1.0": Mutation(
        "fusedres/plain_layer.py", "            type(options[4]),\n", "", "test_plain_layer.py"
    ),
    "a plain layer: recompute keeps": Mutation(
        "fusedres/plain_layer.py", "not spec.recompute", "True", "test_module.py"
    ),
    "a layer's backward: hidden from transforms": Mutation(
        "fusedres/ops.py",
        '@torch.library.impl(_LIBRARY, "layer_backward", "FuncTorchDynamicLayerFrontMode")',
        "#",
        "test_plain_layer.py",
    ),
    "a layer's backward: a dropped row as another's": Mutation(
        "fusedres/ops.py", "else seeds[0])", "else seeds[0] + 1)", "test_plain_layer.py"
    ),
    "plans: 12.x taken for Blackwell": Mutation(
        "fusedres/dispatch.py", "100 <= capability < 120", "100 <= capability", "test_plans.py"
    ),
    "vanish: no network takes a skip": Mutation(
        "fusedres/studies/vanish.py", '"auto" if has_skips else None', "None", "test_study_vanish.py"
    ),
    "vanish: dz without φ'": Mutation(
        "fusedres/studies/vanish.py", "torch.autograd.grad(F.gelu(z), z, one.g)", "(one.g,)", "test_study_vanish.py"
    ),
    "vanish: zeros are those of the plain network": Mutation(
        "fusedres/studies/vanish.py", "build(case.sizes).to", "build(case.sizes[:1] * 2).to", "test_study_vanish.py"
    ),
    "halves: the skip reads the branch's view": Mutation(
        "fusedres/studies/halves.py",
        "else h.view_as(h)\n        skip = through_skip",
        "else h.view_as(h)\n        skip = through_branch",
        "test_study_vanish.py",
    ),
    "halves: Πλ without λ": Mutation(
        "fusedres/studies/halves.py", "norm = abs(scale) * (", "norm = (", "test_study_vanish.py"
    ),
    "lambda: h is the skip of a block": Mutation(
        "fusedres/studies/skip_scale.py",
        "self.second(self.first(x), x)",
        "self.second(self.first(x))",
        "test_study_lambda.py",
    ),
    "lambda: ReLU passes everything": Mutation(
        "fusedres/studies/skip_scale.py", "torch.where(y > 0, dy, 0.0)", "dy", "test_study_lambda.py"
    ),
    "lambda: λ is 1": Mutation(
        "fusedres/studies/skip_scale.py", "skip_scale=scale, branch", "skip_scale=1.0, branch", "test_study_lambda.py"
    ),
    "fan: Πλ of one layer more": Mutation(
        "fusedres/gradients/fan.py", "[scale**k for", "[scale ** (k + 1) for", "test_study_lambda.py"
    ),
    "shortcut: projections not taken": Mutation(
        "fusedres/studies/shortcut.py", '"projection": "projection"}', '"projection": None}', "test_study_shortcut.py"
    ),
    "shortcut: projections not counted": Mutation(
        "fusedres/studies/shortcut.py", "(1 + is_projected)", "1", "test_study_shortcut.py"
    ),
    "depth: residual networks without skips": Mutation(
        "fusedres/studies/depth.py", '("identity", 1 / self.depth)', "(None, 1 / self.depth)", "test_study_depth.py"
    ),
    "lesion: always the last layer": Mutation(
        "fusedres/studies/lesion.py",
        "[self.weights[kept]]",
        "[self.weights[: len(kept)]]",
        "test_study_depth.py",
    ),
    "lesion: the removed layer's scale stays": Mutation(
        "fusedres/studies/lesion.py",
        "name) for i in kept]]",
        "name) for i in range(len(kept))]]",
        "test_study_depth.py",
    ),
    "a share's last step lost": Mutation(
        "kernels/triton/weight_gradient.py", "first + least + (split < more).to(tl.int32)", "first + least", WEIGHT
    ),
    "dw's rows masked too late": Mutation(
        "kernels/triton/weight_gradient.py", "in_m = r < M - step * BLOCK_M", "in_m = r < BLOCK_M", WEIGHT
    ),
    "dw's last column unwritten": Mutation(
        "kernels/triton/weight_gradient.py", "n < N, k < K, total)", "n < N, k < K - 1, total)", WEIGHT
    ),
    "dw's columns of x by those of dz": Mutation(
        "kernels/triton/weight_gradient.py", "in_n, in_k = n < N, k < K", "in_n, in_k = n < N, k < N", WEIGHT
    ),
    "dw's last group of tiles as high as others": Mutation(
        "kernels/triton/weight_gradient.py", "height = min(GROUP, row_tiles - above)", "height = GROUP", WEIGHT
    ),
    "sums: the total of one block alone": Mutation(
        "kernels/triton/sums.py", "for first in range(0, n, BLOCK)", "for first in range(0, 1, BLOCK)", "test_layer.py"
    ),
    "shares past the first 64 lost": Mutation(
        "kernels/triton/sums.py", "range(0, rows, SHARES)", "range(0, 1, SHARES)", WEIGHT
    ),
    "shares rounded before they are added": Mutation(
        "kernels/triton/weight_gradient.py",
        "x.new_empty(splits, N, K, dtype=torch.float32)",
        "x.new_empty(splits, N, K, dtype=dtype)",
        WEIGHT + " -k rounded_once",
    ),
    "32-bit row offsets in dw": Mutation(
        "kernels/triton/weight_gradient.py",
        "m = first.to(tl.int64) * BLOCK_M + r",
        "m = first * BLOCK_M + r",
        WEIGHT + " -k offsets",
    ),
    "fp16 accumulation in dw": Mutation(
        "kernels/triton/weight_gradient.py",
        "        total = tl.dot(tl.trans(dz), x, total, input_precision=PRECISION)\n        dz_tile",
        "        total = tl.dot(tl.trans(dz), x, total, input_precision=PRECISION).to(tl.float16).to(tl.float32)\n"
        "        dz_tile",
        WEIGHT + " -k close",
    ),
    "a program stops at its first item": Mutation(
        "kernels/triton/weight_gradient.py",
        "range(tl.program_id(0), items, tl.num_programs(0))",
        "range(tl.program_id(0), items, items)",
        WEIGHT + " -k number_of_programs",
    ),
}


MUTATIONS |= {
    "sum: da of dropped samples": Mutation(
        "kernels/triton/residual.py",
        "da = drop_rows(da, m",
        "da = drop_rows(g, m",
        "test_residual.py -k triton and nan",
    ),
    "sum: λ ignored": Mutation("kernels/triton/residual.py", "y += scale(lam_ptr, lam) *", "y +=", SUM),
    "sum: channels by the row before": Mutation("kernels/triton/residual.py", "ptr + m % C", "ptr + (m + 1) % C", SUM),
    "sum: samples of one row": Mutation(
        "kernels/triton/residual.py", "run = M // view.samples", "run = 1", "test_residual.py -k channel_dimension"
    ),
    "sum: partial sums of the first tile of columns": Mutation(
        "kernels/triton/residual.py", "tl.program_id(0) % tiles", "0", "test_residual.py -k channel_dimension"
    ),
    "sum: g passed on where λ is not 1": Mutation(
        "fusedres/residual_ops.py", "passes_x = terms[3] is None and spec.skip_scale == 1.0", "passes_x = True", SUM
    ),
    "sum: a branch laid out otherwise": Mutation(
        "fusedres/residual_launch.py", "if tensor.stride() == layout:", "if tensor.is_contiguous():", SUM
    ),
    "sum: samples that do not lie one by one": Mutation(
        "fusedres/residual_launch.py",
        "is_by_sample = not drops or",
        "is_by_sample = True or",
        "test_residual.py -k layout",
    ),
    "sum: the formula's da of dropped samples": Mutation(
        "fusedres/reference.py", "(g * dropped(branch))", "(g * branch)", "test_residual.py -k second"
    ),
    "C++: sum: last numbers of a dot product": Mutation(
        "kernels/cpu/residual_loops.h", "if (i < n) sums[1]", "if (false) sums[1]", "test_residual.py -k cpu and scale"
    ),
    "C++: sum: dropped samples written": Mutation(
        "kernels/cpu/residual_loops.h",
        "if (!line.is_kept)\n                    std",
        "if (false)\n                    std",
        "test_residual.py -k cpu and gone",
    ),
    "C++: sum: columns of a part of a row": Mutation(
        "kernels/cpu/residual_loops.h",
        "scales.get() + (call.channels > LINE ? line.column : 0)",
        "scales.get()",
        "test_residual.py -k cpu and channel_dimension",
    ),
    "C++: sum: keep_scale missing in da": Mutation(
        "kernels/cpu/residual_loops.h",
        "lines.keep_scale() * dot(n, g, b)",
        "dot(n, g, b)",
        "test_residual.py -k cpu and scale",
    ),
    "C++: sum: one share's sums": Mutation(
        "kernels/cpu/residual_loops.h",
        "row < lines.shares * width; row += K",
        "row < width; row += K",
        "test_residual.py -k cpu and channel_dimension",
    ),
    "C++: record: exponents half as fine": Mutation(
        "kernels/cpu/tally.h",
        "inside >> Bits::MANTISSA) & (BINS",
        "inside >> (Bits::MANTISSA + 1)) & (BINS",
        "test_recording.py -k cpu and exponents",
    ),
    "C++: record: halves exchanged": Mutation(
        "kernels/cpu/record.h",
        "row[piece.half.is_skip ? recorded::SKIP : recorded::BRANCH] += square * first;",
        "row[piece.half.is_skip ? recorded::BRANCH : recorded::SKIP] += square * first;",
        "test_recording.py -k cpu and every_way and blocks",
    ),
    "C++: record: what cancels is lost": Mutation(
        "kernels/cpu/record.h",
        "largest == 0 ? !piece.half.numbers || is_zero(piece)",
        "largest == 0 ? true",
        "test_recording.py -k cpu and cancel",
    ),
    "C++: record: lanes of rows that are not there": Mutation(
        "kernels/cpu/lanes_backward.h",
        "record->add(l, dh, R, K, count, half)",
        "record->add(l, dh, R, K, R, half)",
        "test_recording.py -k cpu and every_way and lanes",
    ),
    "C++: record: no half held in layers": Mutation(
        "kernels/cpu/layers.h",
        "if (record) record->add(l, to + begin, K, rows.count, end - begin, half);",
        "if (record) record->add(l, to + begin, K, rows.count, end - begin, Half<C>{});",
        "test_recording.py -k cpu and every_way and layers",
    ),
    "C++: record: padding counted": Mutation(
        "kernels/cpu/record.h",
        "counts[0] > piece.padding) count_small(row, piece, int64_t(counts[0]) - piece.padding",
        "counts[0] > 0) count_small(row, piece, int64_t(counts[0])",
        "test_recording.py -k cpu and next_to_each_other",
    ),
    "C++: record: a carry lost": Mutation(
        "kernels/cpu/tally.h",
        "carry = (sum & a) | (either & b);",
        "carry = sum & a;",
        "test_recording.py -k cpu and exponents",
    ),
    "watch: a tensor that comes twice counts twice": Mutation(
        "fusedres/gradients/hooks.py",
        "if found is None or found.tensor() is not tensor:",
        "if True:",
        "test_watching.py -k twice or checkpoint",
    ),
    "watch: gradients differentiated again are told": Mutation(
        "fusedres/recording.py",
        "        found[0].spoil(range(found[1], found[1] + layers))",
        "        pass",
        "test_watching.py -k again",
    ),
    "watch: both halves after autocast's cast": Mutation(
        "fusedres/functional.py",
        "x, skip = (x, x) if not spec.watch else",
        "x, skip = (x, x) if True else",
        "test_watching.py -k autocast",
    ),
    "drop: z of dropped rows kept in a layer": Mutation(
        "kernels/triton/layer_backward.py",
        "        if DROPS:\n            z = drop_rows(z",
        "        if False:\n            z = drop_rows(z",
        "test_layer.py -k spoils",
    ),
    "drop: z of dropped rows kept in a run": Mutation(
        "kernels/triton/stack_backward.py",
        "        if seed_ptr is not None:\n            z = drop_rows(z",
        "        if False:\n            z = drop_rows(z",
        "test_layer.py -k spoils",
    ),
    "record: sums of another unit": Mutation(
        "kernels/triton/record.py",
        "kept = before * inverse",
        "kept = 1.0",
        "test_recording.py -k triton and lost or test_runs",
    ),
    "record: rows outside the tile counted": Mutation(
        "kernels/triton/record.py",
        "tl.where(e == 0, size - inside, 0)",
        "tl.where(e == 0, 0, 0)",
        "test_recording.py -k triton and test_stacks",
    ),
    "record: the largest of parts added": Mutation(
        "fusedres/recording.py",
        "found[..., record.LARGEST] = stacked[..., record.LARGEST].amax(1)",
        "found[..., record.LARGEST] = stacked[..., record.LARGEST].sum(1)",
        "test_recording.py -k triton and lost",
    ),
    "record: a scaler's scale left in": Mutation(
        "fusedres/gradients/recorder.py",
        'return scale.reciprocal() if device.type != "cpu" else 1.0 / float(scale)',
        "return 1.0",
        "test_recorder.py -k scaler and cpu",
    ),
    "record: λ missing on the path of skips": Mutation(
        "fusedres/gradients/watch.py",
        "path *= abs(scale)",
        "path *= 1.0",
        "test_recording.py -k path_of_skips and cpu",
    ),
    "record: the first readouts let go": Mutation(
        "fusedres/gradients/recorder.py",
        "self._kept[::2]",
        "self._kept[1::2]",
        "test_recorder.py -k spread",
    ),
    "narrow: bias subtracted": Mutation(
        NARROW, "                z += b\n", "                z -= b\n", "test_narrow.py -k every_activation"
    ),
    "narrow: slope at z": Mutation(
        NARROW, "g *= slope(v, ACTIVATION)", "g *= slope(z, ACTIVATION)", "test_narrow.py -k every_scale"
    ),
    "narrow: λ missing in dx": Mutation(
        NARROW, "skip = lam * g if IS_IDENTITY", "skip = g if IS_IDENTITY", "test_narrow.py -k every_scale"
    ),
    "narrow: λ missing in ds": Mutation(
        NARROW, "in_m, in_n, lam * g)", "in_m, in_n, g)", "test_narrow.py -k every_scale"
    ),
    "narrow: dλ sums the branch": Mutation(NARROW, "tl.sum(g * s,", "tl.sum(g * g,", "test_narrow.py -k every_scale"),
    "narrow: da of the last tile alone": Mutation(NARROW, "da += tl.sum", "da = tl.sum", "test_narrow.py -k programs"),
    "narrow: last row lost": Mutation(
        NARROW, "in_m = i < M - first\n", "in_m = i < M - first - 1\n", "test_narrow.py -k edges"
    ),
    "narrow: last feature lost": Mutation(
        NARROW, "in_n, in_k = n < N, k < K", "in_n, in_k = n < N, k < K - 1", "test_narrow.py -k every_width"
    ),
    "narrow: a program lost": Mutation(
        "kernels/triton/sums.py", "(r < rows - r0)", "(r < 1)", "test_narrow.py -k programs"
    ),
    "narrow: programs added in any order": Mutation(
        NARROW,
        "added(into, operands)",
        "added({name: part[torch.randperm(len(part))] for name, part in into.items()}, operands)",
        "test_narrow.py -k two_runs",
    ),
    "narrow: other rows dropped": Mutation(
        NARROW, "keeps_row(first + i,", "keeps_row(i,", "test_narrow.py -k stochastic"
    ),
    "narrow: z of dropped rows kept": Mutation(
        NARROW, "z = tl.where(keeps, z, 0.0)", "z = z + 0.0", "test_narrow.py -k spoils"
    ),
    "narrow: NaN in z's padding": Mutation(NARROW, "if N < BLOCK_N:", "if False:", "test_narrow.py -k no_number"),
    "narrow: transposed incoming gradient ignored": Mutation(
        NARROW, "g, x = rows(g), rows(operands.x)", "g, x = g, rows(operands.x)", "test_narrow.py -k incoming"
    ),
    "narrow: strided vectors ignored": Mutation(
        NARROW, "b, a = vector(b), vector(a)", "pass", "test_narrow.py -k of_operands"
    ),
    "narrow: dw in fp16": Mutation(
        NARROW,
        "tl.trans(dz_operand), dw, input_precision=PRECISION)",
        "tl.trans(dz_operand), dw, input_precision=PRECISION).to(tl.float16).to(tl.float32)",
        "test_narrow.py -k many_tiles",
    ),
    "narrow: 32-bit row offsets": Mutation(
        NARROW, "tl.arange(0, BLOCK_M).to(tl.int64)", "tl.arange(0, BLOCK_M)", "test_narrow.py -k 32_bits"
    ),
    "narrow: ds of x's type": Mutation(
        NARROW, "ds = residual.new_empty(M, N)", "ds = x.new_empty(M, N)", "test_narrow.py -k wider"
    ),
    "narrow: ds in g's memory": Mutation(NARROW, "ds = residual.new_empty(M, N)", "ds = g", "test_narrow.py -k share"),
    "narrow: z only for da": Mutation(
        NARROW, '"NEEDS_Z": spec.activation != "none" or wanted', '"NEEDS_Z": wanted', "test_narrow.py -k subset"
    ),
    "narrow: one half recorded twice": Mutation(
        NARROW, "unscale_ptr, dx, skip,", "unscale_ptr, dx, dx,", "test_narrow.py -k recorded"
    ),
    "narrow: widest rows cut": Mutation(
        NARROW, '"BLOCK_K": padded(K)', '"BLOCK_K": min(64, padded(K))', "test_narrow.py -k widest"
    ),
    "types: a layer's call is Any": Mutation(
        "fusedres/modules.py", "def __call__(self, x: Tensor", "def _call(self, x: Tensor", "test_typed.py -k judged"
    ),
    "distribution: headers left out": Mutation(
        "pyproject.toml", '["*.cpp", "*.h"]', '["*.cpp"]', "test_distribution.py -k nothing_else"
    ),
    "distribution: tests in the sdist": Mutation(
        "MANIFEST.in", "prune tests", "prune bench", "test_distribution.py -k nothing_else"
    ),
    "docs: another way": Mutation("docs/performance.md", "way lanes", "way dots", "test_readme.py -k a_page_runs"),
    "docs: an argument that there is not": Mutation(
        "fusedres/modules.py", '        order: "pre"', '        orders: "pre"', "test_readme.py -k build"
    ),
    "docs: a page that is not there": Mutation("docs/index.md", "(stack.md)", "(stacks.md)", "test_readme.py -k build"),
    "docs: a rule of another test": Mutation(
        "tests/tolerances.py", "max_error=4.0", "max_error=5.0", "test_readme.py -k rules"
    ),
    "tools: the engine is asked within a program": Mutation(
        "fusedres/dispatch.py",
        "thread.submit(launch.capabilities).result()",
        "launch.capabilities()",
        f"{COMPILERS} -k no_question",
    ),
    "tools: ONNX is given fused layers": Mutation(
        "fusedres/dispatch.py", "if torch.onnx.is_in_onnx_export():", "if False:", f"{COMPILERS} -k onnx and dynamo"
    ),
    "tools: ONNX is given slices for parameters": Mutation(
        "fusedres/stack/module.py", "if torch.onnx.is_in_onnx_export():", "if False:", f"{COMPILERS} -k torchscript"
    ),
    "tools: TorchScript is given fused layers": Mutation(
        "fusedres/dispatch.py", "if torch.jit.is_tracing():", "if False:", f"{COMPILERS} -k test_traced"
    ),
    "tools: TorchScript is given fused sums": Mutation(
        "fusedres/residual_dispatch.py", "if torch.jit.is_tracing():", "if False:", f"{COMPILERS} -k with_every"
    ),
    "tools: tracing warns": Mutation(
        "fusedres/dispatch.py", 'module=r"fusedres', 'module=r"fused', f"{COMPILERS} -k word"
    ),
    "tools: a converted stack is still bound": Mutation(
        "fusedres/stack/module.py",
        "self._let_go()\n        return",
        "return",
        f"{TRAINING} -k change_places",
    ),
    "tools: a loaded stack is still bound": Mutation(
        "fusedres/stack/module.py", "self._let_go()\n        for", "for", f"{TRAINING} -k change_places"
    ),
    "tools: a parametrized weight is computed twice": Mutation(
        "fusedres/stack/module.py", "for one in tensors) else None", "for one in self._tensors()) else None", TRAINING
    ),
    "tools: a pre-release of the oldest torch is refused": Mutation(
        "fusedres/requirement.py", ">= OLDEST:", "> OLDEST:", "test_requirement.py"
    ),
    "DTensor: x itself as the skip of divided columns": Mutation(
        SHARDING, 'in ("none", "residual", "projection")', 'in ("none", "residual", "projection", "identity")', DIVIDED
    ),
    "DTensor: dx of divided columns not summed": Mutation(SHARDING, "dx=sum_", "dx=Replicate()", DIVIDED),
    "DTensor: a choice remembered for other options": Mutation(
        SHARDING, 'known[operator].static_argnum = names.index("activation")', "pass", DIVIDED
    ),
    "DTensor: dropped rows counted from a rank's first": Mutation(
        SHARDING, "if spec.drop_path == 0", "if True", DIVIDED
    ),
    "DTensor: what is kept laid out by other rows": Mutation(
        "fusedres/ops.py",
        "if x.dim() > 2 and kept.numel() > 0",
        "if False",
        "test_distributed_tensors.py -k interpreted",
    ),
    "tensor parallel: own columns' gradient not summed": Mutation(
        STYLES, "grad_placements=[Partial()]).narrow", "grad_placements=[Replicate()]).narrow", DIVIDED
    ),
    "tensor parallel: bias's gradient of a rank's rows alone": Mutation(
        STYLES,
        "gradient = Replicate() if isinstance(output, Replicate) else Partial()",
        "gradient = Replicate()",
        DIVIDED,
    ),
    "FSDP: slices of a parameter that ranks divide": Mutation(
        "fusedres/stack/runs.py", "stack = _gathered(stack)", "pass", DIVIDED
    ),
    "stages: an activation left out between them": Mutation(
        "fusedres/parallel/pipeline.py", 'options.pop("last_activation", None)', "pass", "test_stages.py"
    ),
}

for _name, (_file, _right, _wrong, *_tests) in FUSING.items():
    MUTATIONS[_name] = Mutation(f"fusedres/fusing/{_file}", _right, _wrong, *(_tests or ["test_fuse.py"]))


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass on a copy of the project with this mutation in it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "fusedres-mutated"
        shutil.copytree(
            ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "*.egg-info", ".*_cache")
        )
        target = copy / mutation.file
        source = target.read_text()
        assert source.count(mutation.right) >= 1, f"{mutation.file} no longer has {mutation.right!r}"
        target.write_text(source.replace(mutation.right, mutation.wrong))
        tests, *options = mutation.tests.split(" -k ")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += [f"tests/{name}" for name in tests.split()] + [word for o in options for word in ("-k", o)]
        environment = {"PYTHONPATH": str(copy)}
        if mutation.file.startswith("kernels/cpu/"):  # no broken library in the user's cache
            environment["FUSEDRES_CACHE"] = str(Path(folder) / "cache")
        run = subprocess.run(command, cwd=copy, env=os.environ | environment, capture_output=True, text=True)
        if run.returncode > 1:  # a negative one is a signal's: broken C++ may crash, which nobody overlooks
            raise RuntimeError(f"the tests did not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        return run.returncode == 0


def main(names: list[str]) -> int:
    survivors = 0
    for name in names or MUTATIONS:
        alive = survives(MUTATIONS[name])
        survivors += alive
        print(f"{'PASSED, the suite is blind to it' if alive else 'found':<34}{name}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
