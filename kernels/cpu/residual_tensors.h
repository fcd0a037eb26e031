// residual.h for PyTorch: tensors of one dtype that lie alike in memory, seen as kernels/spec.py's View says.
#pragma once

#include "residual.h"
#include "tensors.h"

namespace fusedres {
namespace {

// All of a call but the two terms and the gradient: learned scales as tensors, in the place of numbers.
struct Scaling {
    const std::optional<Tensor> &branch_scale, &skip_scale;
    double branch_number, skip_number;
    const std::optional<Tensor> &seed;
    int64_t drop_threshold;
    double keep_scale;
    at::IntArrayRef view;
};

// The call without its addresses; `scales` is where its a [channels] lies.
inline Residual described(const Tensor &like, const Scaling &scaling, Tensor *scales) {
    constexpr int64_t WORTH_A_THREAD = 1 << 15;
    TORCH_CHECK(scaling.view.size() == 5 && scaling.view[0] * scaling.view[1] == like.numel(), "view must be of the memory of ",
                like.sizes(), ", got ", scaling.view);
    Residual call = {};
    call.stretches = scaling.view[0], call.length = scaling.view[1], call.samples = scaling.view[2];
    call.channels = scaling.view[3], call.per = Per(scaling.view[4]);
    call.branch_scale = scaling.branch_number, call.skip_scale = scaling.skip_number;
    if (scaling.skip_scale) call.skip_scale = number(*scaling.skip_scale, 0);
    if (scaling.branch_scale) {
        TORCH_CHECK(scaling.branch_scale->numel() == call.channels, call.channels, " scales expected, got ",
                    scaling.branch_scale->sizes());
        if (call.per == Per::all) {
            call.branch_scale = number(*scaling.branch_scale, 0);
        } else {
            const auto computed = like.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
            *scales = scaling.branch_scale->resolve_neg().to(computed).contiguous();
            call.scales = scales->const_data_ptr();
        }
    }
    call.keep_scale = scaling.keep_scale;
    if (scaling.seed) call.seed = uint64_t(*scaling.seed->const_data_ptr<int64_t>()), call.drop_threshold = uint64_t(scaling.drop_threshold);
    const int64_t threads = std::clamp<int64_t>(like.numel() / WORTH_A_THREAD, 1, at::get_num_threads());
    call.threads = at::in_parallel_region() ? 1 : int(threads);
    return call;
}

inline const void *address_alike(const Tensor &tensor, const Tensor &like) {
    TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == like.scalar_type() && tensor.sizes() == like.sizes() &&
                    tensor.strides() == like.strides(),
                "tensors must lie alike: ", like.sizes(), " with strides ", like.strides(), " of ", like.scalar_type(),
                " expected, got ", tensor.sizes(), " with strides ", tensor.strides(), " of ", tensor.scalar_type());
    return tensor.const_data_ptr();
}

inline Tensor fresh_alike(const Tensor &like) {
    Tensor tensor = fresh(like.sizes(), like.scalar_type());
    if (tensor.strides() != like.strides()) tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
    return tensor;
}

inline Tensor run_residual(const Tensor &branch, const Tensor &x, const Scaling &scaling) {
    Tensor scales, y = fresh_alike(branch);
    Residual call = described(branch, scaling, &scales);
    call.branch = branch.const_data_ptr(), call.x = address_alike(x, branch), call.y = y.mutable_data_ptr();
    by_dtype(y.scalar_type(), [&](auto type) { residual_forward<decltype(type)>(call); });
    return y;
}

// Of branch, x, a and λ, those wanted.
inline std::vector<Tensor> run_residual_backward(const Tensor &g, const std::optional<Tensor> &branch,
                                                 const std::optional<Tensor> &x, const Scaling &scaling,
                                                 c10::ArrayRef<bool> wanted) {
    TORCH_CHECK(wanted.size() == 4 && (!wanted[2] || (branch && scaling.branch_scale)) && (!wanted[3] || (x && scaling.skip_scale)),
                "a scale's gradient needs the scale, and what it scales");
    Tensor scales, total, dlambda, dx, dbranch;
    Residual call = described(g, scaling, &scales);
    call.g = g.const_data_ptr();
    if (branch) call.branch = address_alike(*branch, g);
    if (x) call.x = address_alike(*x, g);
    if (wanted[0]) dbranch = fresh_alike(g), call.dbranch = dbranch.mutable_data_ptr();
    if (wanted[1]) dx = fresh_alike(g), call.dx = dx.mutable_data_ptr();
    if (wanted[2]) total = fresh(scaling.branch_scale->sizes(), at::kDouble), call.dbranch_scale = total.mutable_data_ptr<double>();
    if (wanted[3]) dlambda = fresh({}, at::kDouble), call.dskip_scale = dlambda.mutable_data_ptr<double>();
    by_dtype(g.scalar_type(), [&](auto type) { residual_backward<decltype(type)>(call); });
    std::vector<Tensor> found;
    if (wanted[0]) found.push_back(std::move(dbranch));
    if (wanted[1]) found.push_back(std::move(dx));
    if (wanted[2]) found.push_back(total.to(scaling.branch_scale->scalar_type()));
    if (wanted[3]) found.push_back(dlambda.to(scaling.skip_scale->scalar_type()));
    return found;
}

}  // namespace
}  // namespace fusedres
