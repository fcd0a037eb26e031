// The engine as PyTorch operators.
#include <torch/library.h>

#include <mutex>
#include <unordered_map>

#include "node.h"
#include "residual_tensors.h"
#include "smooth.h"
#include "tensors.h"

namespace fusedres {
namespace {

using Parameters = c10::List<std::optional<Tensor>>;

std::vector<Tensor> listed(const Parameters &from) {
    std::vector<Tensor> parameters;
    parameters.reserve(from.size());
    for (const std::optional<Tensor> parameter : from) parameters.push_back(parameter.value_or(Tensor()));
    return parameters;
}

int64_t capabilities() { return int64_t(has_brgemm(at::kFloat)) + 2 * int64_t(has_brgemm(at::kBFloat16)); }

std::tuple<Tensor, Tensor> forward_operator(const Tensor &plan, const Parameters &parameters, const Tensor &x,
                                            const std::optional<Tensor> &residual, const std::optional<Tensor> &seeds,
                                            int64_t way, c10::List<bool> wanted, bool keep) {
    check_slots(plan, parameters.size());
    const Wishes wants(wanted.begin(), wanted.end());
    Tensor kept;
    Tensor y = run_forward(plan, listed(parameters), x, residual, seeds, way, wants, keep ? &kept : nullptr);
    return {y, keep ? kept : fresh({0}, at::kByte)};
}

std::vector<Tensor> backward_operator(const Tensor &plan, const Parameters &parameters, const Tensor &x,
                                      const std::optional<Tensor> &residual, const std::optional<Tensor> &seeds,
                                      const Tensor &kept, const Tensor &g, int64_t way, c10::List<bool> wanted,
                                      std::optional<double> unscale) {
    check_slots(plan, parameters.size());
    const Wishes wants(wanted.begin(), wanted.end());
    Tensor record;
    std::vector<Tensor> found = run_backward(plan, listed(parameters), x, residual, seeds, kept, wants, g, way, wants,
                                             unscale.value_or(0), unscale ? &record : nullptr);
    found.push_back(record);
    found.erase(std::remove_if(found.begin(), found.end(), [](const Tensor &t) { return !t.defined(); }), found.end());
    return found;
}

// A row for each tensor, of its numbers and of the halves of them that came through a branch, if there are any.
Tensor statistics(const std::vector<Tensor> &totals, const std::vector<Tensor> &branches, double unscale) {
    TORCH_CHECK(branches.empty() || branches.size() == totals.size(), "a branch for each gradient expected, or none");
    Tensor rows = at::zeros({int64_t(totals.size()), recorded::COLUMNS}, at::kDouble);
    if (totals.empty()) return rows;
    const at::ScalarType dtype = totals[0].scalar_type();
    std::vector<Tensor> held;
    std::vector<Recorded> all;
    for (size_t i = 0; i < totals.size(); i++) {
        const Tensor total = totals[i].resolve_neg().contiguous();
        const Tensor branch = branches.empty() ? Tensor() : branches[i].resolve_neg().contiguous();
        TORCH_CHECK(total.scalar_type() == dtype, "gradients of one dtype expected, got ", dtype, " and ", total.scalar_type());
        TORCH_CHECK(!branch.defined() || (branch.scalar_type() == dtype && branch.numel() == total.numel()),
                    "a branch of the gradient's size and dtype expected, got ", branch.sizes(), " for ", total.sizes());
        held.insert(held.end(), {total, branch});
        all.push_back({total.const_data_ptr(), branch.defined() ? branch.const_data_ptr() : nullptr, total.numel()});
    }
    const int threads = at::in_parallel_region() ? 1 : at::get_num_threads();
    by_dtype(dtype, [&](auto type) { record_numbers<decltype(type)>(all, unscale, threads, rows.mutable_data_ptr<double>()); });
    return rows;
}

Tensor residual_operator(const Tensor &branch, const Tensor &x, const std::optional<Tensor> &branch_scale,
                         const std::optional<Tensor> &skip_scale, double branch_number, double skip_number,
                         const std::optional<Tensor> &seed, int64_t drop_threshold, double keep_scale, at::IntArrayRef view) {
    return run_residual(branch, x, {branch_scale, skip_scale, branch_number, skip_number, seed, drop_threshold, keep_scale, view});
}

std::vector<Tensor> residual_backward_operator(const Tensor &g, const std::optional<Tensor> &branch,
                                               const std::optional<Tensor> &x, const std::optional<Tensor> &branch_scale,
                                               const std::optional<Tensor> &skip_scale, double branch_number,
                                               double skip_number, const std::optional<Tensor> &seed, int64_t drop_threshold,
                                               double keep_scale, at::IntArrayRef view, c10::List<bool> wanted) {
    const Wishes wants(wanted.begin(), wanted.end());
    const Scaling scaling{branch_scale, skip_scale, branch_number, skip_number, seed, drop_threshold, keep_scale, view};
    return run_residual_backward(g, branch, x, scaling, wants);
}

// ------------------------------------------------------------------------------------------------ bound networks

std::mutex bound_mutex;
std::unordered_map<int64_t, std::shared_ptr<const Bound>> bound;
int64_t next_handle = 1;

int64_t bind(const Tensor &plan, const Parameters &parameters) {
    check_slots(plan, parameters.size());
    std::lock_guard<std::mutex> lock(bound_mutex);
    bound.emplace(next_handle, std::make_shared<const Bound>(Bound{plan, listed(parameters)}));
    return next_handle++;
}

void unbind(int64_t handle) {
    std::shared_ptr<const Bound> last;  // freed after the lock
    std::lock_guard<std::mutex> lock(bound_mutex);
    auto found = bound.find(handle);
    if (found == bound.end()) return;
    last = std::move(found->second);
    bound.erase(found);
}

std::shared_ptr<const Bound> bound_as(int64_t handle) {
    std::lock_guard<std::mutex> lock(bound_mutex);
    const auto found = bound.find(handle);
    TORCH_CHECK(found != bound.end(), "network ", handle, " is not bound");
    return found->second;
}

// y, with a node in autograd's graph where something requires a gradient.
Tensor called(const Tensor &x, at::TensorList parameters, const std::optional<Tensor> &residual, const Run &run) {
    auto requires_grad = [](const Tensor &tensor) { return tensor.requires_grad(); };
    const bool is_wanted = c10::GradMode::is_enabled() &&
                           (x.requires_grad() || (residual && residual->requires_grad()) ||
                            std::any_of(parameters.begin(), parameters.end(), requires_grad));
    if (is_wanted) return ResidualNetwork::apply(x, parameters, residual, run);
    return run_forward(run.plan, parameters, x, residual, run.seeds, run.way, {}, nullptr);
}

Tensor run(int64_t handle, const Tensor &x, int64_t way, const std::optional<Tensor> &seeds, bool keep, int64_t watch) {
    const std::shared_ptr<const Bound> network = bound_as(handle);
    return called(x, network->parameters, std::nullopt, {network->plan, handle, seeds, way, keep, watch});
}

// One layer, its tensors handed over; more: those besides weight and bias, in the order of their slots.
Tensor layer(const Tensor &plan, int64_t way, const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias,
             const std::optional<Tensor> &residual, bool keep, const std::optional<Tensor> &seeds,
             const std::optional<c10::List<Tensor>> &more) {
    c10::SmallVector<Tensor, 6> parameters{weight};
    if (bias) parameters.push_back(*bias);
    if (more) parameters.append(more->begin(), more->end());
    check_slots(plan, parameters.size());
    return called(x, parameters, residual, {plan, ONE_LAYER, seeds, way, keep, 0});
}

}  // namespace
}  // namespace fusedres

TORCH_LIBRARY(fusedres_cpu, library) {
    library.def("capabilities() -> int", fusedres::capabilities);
    library.def("bind(Tensor plan, Tensor?[] parameters) -> int");
    library.def("unbind(int network) -> ()", fusedres::unbind);
    // An implementation for every key, autograd's too: they make their node themselves.
    library.def("run(int network, Tensor x, int way, Tensor? seeds=None, bool keep=True, int watch=0) -> Tensor", fusedres::run);
    library.def(
        "layer(Tensor plan, int way, Tensor x, Tensor weight, Tensor? bias=None, Tensor? residual=None, bool keep=True, "
        "Tensor? seeds=None, Tensor[]? more=None) -> Tensor",
        fusedres::layer);
    library.def("activate(Tensor z, int activation) -> Tensor", fusedres::smooth);
    library.def(
        "forward(Tensor plan, Tensor?[] parameters, Tensor x, Tensor? residual, Tensor? seeds, int way, bool[] wanted, "
        "bool keep) -> (Tensor, Tensor)");
    library.def(
        "backward(Tensor plan, Tensor?[] parameters, Tensor x, Tensor? residual, Tensor? seeds, Tensor kept, Tensor g, "
        "int way, bool[] wanted, float? unscale=None) -> Tensor[]");
    library.def("statistics(Tensor[] totals, Tensor[] branches, float unscale) -> Tensor");
    library.def(
        "residual(Tensor branch, Tensor x, Tensor? branch_scale, Tensor? skip_scale, float branch_number, "
        "float skip_number, Tensor? seed, int drop_threshold, float keep_scale, int[] view) -> Tensor");
    library.def(
        "residual_backward(Tensor g, Tensor? branch, Tensor? x, Tensor? branch_scale, Tensor? skip_scale, "
        "float branch_number, float skip_number, Tensor? seed, int drop_threshold, float keep_scale, int[] view, "
        "bool[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fusedres_cpu, CPU, library) {
    library.impl("bind", fusedres::bind);
    library.impl("forward", fusedres::forward_operator);
    library.impl("backward", fusedres::backward_operator);
    library.impl("statistics", fusedres::statistics);
    library.impl("residual", fusedres::residual_operator);
    library.impl("residual_backward", fusedres::residual_backward_operator);
}
