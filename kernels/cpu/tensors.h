// From PyTorch's tensors to the engine's calls and back: addresses checked against the plan, strides, threads.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "capabilities.h"
#include "fresh.h"
#include "network.h"
#include "philox.h"
#include "recorded.h"

namespace fusedres {
namespace {

using Wishes = c10::SmallVector<bool, 64>;  // of x, of a residual, and of every parameter, whether its gradient is wanted

// ------------------------------------------------------------------------------------------------ the plan

// As kernels/cpu/plan.py makes it.
constexpr int64_t WORDS = 17;
enum Word { N, K, ACTIVATION, IS_POST, SKIP, SLOTS, INDEX = 11, SKIP_SCALE, BRANCH_SCALE, DROP_PATH, DROP_THRESHOLD, KEEP_SCALE };
enum Slot { WEIGHT, BIAS, PROJECTION, PROJECTION_BIAS, LEARNED_SKIP_SCALE, LEARNED_BRANCH_SCALE };

inline double as_double(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline double number(const Tensor &from, int64_t index) {
    const Tensor tensor = from.is_neg() ? from.resolve_neg() : from;
    switch (tensor.scalar_type()) {
        case at::kFloat: return tensor.const_data_ptr<float>()[index];
        case at::kDouble: return tensor.const_data_ptr<double>()[index];
        case at::kBFloat16: return tensor.const_data_ptr<at::BFloat16>()[index];
        default: return tensor.as_strided({}, {}, tensor.storage_offset() + index).item().toDouble();
    }
}

// The plan as an operator that others see takes it: the first words of layers that are alike but for the slice, how many
// they are, and the numbers after those words.
inline std::pair<c10::List<int64_t>, c10::List<double>> encoded(const Tensor &plan) {
    c10::List<int64_t> codes;
    c10::List<double> numbers;
    const int64_t *words = plan.const_data_ptr<int64_t>(), planned = plan.size(0);
    auto is_next = [](const int64_t *layer, int64_t count) {
        const int64_t *other = layer + count * WORDS;
        return std::equal(layer, layer + INDEX, other) && other[INDEX] == layer[INDEX] + count &&
               std::equal(layer + SKIP_SCALE, layer + DROP_THRESHOLD, other + SKIP_SCALE);
    };
    for (int64_t l = 0, count; l < planned; l += count, words += count * WORDS) {
        for (count = 1; l + count < planned && is_next(words, count);) count++;
        for (int64_t i = 0; i <= INDEX; i++) codes.push_back(words[i]);
        codes.push_back(count);
        for (int64_t i = SKIP_SCALE; i <= DROP_PATH; i++) numbers.push_back(as_double(words[i]));
    }
    return {codes, numbers};
}

// Every slot is one of the parameters': to be known before anything reads them.
inline void check_slots(const Tensor &plan, size_t parameters) {
    const int64_t *words = plan.const_data_ptr<int64_t>();
    for (int64_t l = 0; l < plan.size(0); l++, words += WORDS)
        for (int slot = WEIGHT; slot <= LEARNED_BRANCH_SCALE; slot++)
            TORCH_CHECK(words[SLOTS + slot] < int64_t(parameters), "layer ", l, " has lost a parameter");
}

// The layers as the kernels read them: addresses of tensors that are contiguous, on the CPU, of one dtype.
struct Network {
    int64_t depth = 0;
    Buffer<Layer> layers;  // without those that change no row of this call
    std::vector<Tensor> copies;  // of parameters that are not contiguous, or not worth what their memory says

    // required: of what forward keeps memory for; empty for nothing.
    Network(const Tensor &plan, at::TensorList parameters, const Tensor &x, const std::optional<Tensor> &seeds,
            at::TensorList gradients, c10::ArrayRef<bool> required)
        : layers(plan.size(0)), dtype(x.scalar_type()) {
        const int64_t *words = plan.const_data_ptr<int64_t>(), planned = plan.size(0);
        const int64_t M = x.numel() / std::max<int64_t>(words[K], 1);
        int64_t run = 0;  // how many layers' tensors are stacked with this one's; 0: none
        const int64_t *seed = seeds ? seeds->const_data_ptr<int64_t>() : nullptr;
        for (int64_t l = 0; l < planned; l++, words += WORDS) {
            if (l + AHEAD < planned) prefetch(words + AHEAD * WORDS, parameters);
            Layer &layer = layers[depth];
            layer = {};
            layer.N = words[N], layer.K = words[K], layer.place = l;
            layer.activation = Activation(words[ACTIVATION]);
            layer.is_post = words[IS_POST] != 0;
            layer.skip = Skip(words[SKIP]);
            layer.skip_scale = as_double(words[SKIP_SCALE]), layer.branch_scale = as_double(words[BRANCH_SCALE]);
            layer.keep_scale = as_double(words[KEEP_SCALE]);
            if (seed) layer.drop_threshold = uint64_t(words[DROP_THRESHOLD]), layer.seed = uint64_t(seed[l]);

            const int64_t *slots = words + SLOTS, index = std::max<int64_t>(words[INDEX], 0);
            const bool is_stacked = words[INDEX] >= 0;
            if (!is_stacked)
                run = 0;
            else if (index == 0)
                for (run = 1; l + run < planned && words[run * WORDS + INDEX] == run;) run++;
            auto tensor = [&](Slot slot) -> const Tensor * {
                return slots[slot] < 0 ? nullptr : &parameters[size_t(slots[slot])];
            };
            auto address = [&](Slot slot, int64_t size, int64_t dims) -> const void * {
                const Tensor *found = tensor(slot);
                if (!found) return nullptr;
                if (!fits(*found, dtype, size, dims, run) || (dims == 2 && found->size(-1) != layer.K)) refuse(*found, dtype, size, slot, l);
                const Tensor *dense = found;
                if (!found->is_contiguous() || found->is_neg())
                    dense = &copies.emplace_back(found->resolve_neg().contiguous());
                const c10::TensorImpl &numbers = *dense->unsafeGetTensorImpl();
                const int64_t first = numbers.storage_offset() + index * size;
                return static_cast<const char *>(numbers.unsafe_storage().data()) + first * int64_t(numbers.itemsize());
            };
            auto gradient = [&](Slot slot, int64_t size) -> void * {
                if (gradients.empty() || slots[slot] < 0 || !gradients[size_t(slots[slot])].defined()) return nullptr;
                const Tensor &to = gradients[size_t(slots[slot])];
                return static_cast<char *>(to.mutable_data_ptr()) + index * size * int64_t(to.element_size());
            };
            auto is_required = [&](Slot slot) { return !required.empty() && slots[slot] >= 0 && required[size_t(slots[slot]) + 2]; };

            layer.weight = address(WEIGHT, layer.N * layer.K, 2), layer.bias = address(BIAS, layer.N, 1);
            layer.projection = address(PROJECTION, layer.N * layer.K, 2);
            layer.projection_bias = address(PROJECTION_BIAS, layer.N, 1);
            if (const Tensor *scale = tensor(LEARNED_SKIP_SCALE)) {
                if (!fits(*scale, dtype, 1, 0, run)) refuse(*scale, dtype, 1, LEARNED_SKIP_SCALE, l);
                layer.skip_scale = number(*scale, is_stacked ? index * scale->stride(0) : 0);
            }
            if (const Tensor *scale = tensor(LEARNED_BRANCH_SCALE)) {
                if (is_stacked ? scale->numel() != run : scale->dim() == 1) {
                    layer.channel_scale = address(LEARNED_BRANCH_SCALE, layer.N, 1);
                } else {
                    if (!fits(*scale, dtype, 1, 0, run)) refuse(*scale, dtype, 1, LEARNED_BRANCH_SCALE, l);
                    layer.branch_scale = number(*scale, is_stacked ? index * scale->stride(0) : 0);
                }
            }
            layer.dweight = gradient(WEIGHT, layer.N * layer.K), layer.dbias = gradient(BIAS, layer.N);
            layer.dprojection = gradient(PROJECTION, layer.N * layer.K);
            layer.dprojection_bias = gradient(PROJECTION_BIAS, layer.N);
            layer.dskip_scale = gradient(LEARNED_SKIP_SCALE, 1);
            layer.dbranch_scale = gradient(LEARNED_BRANCH_SCALE, layer.channel_scale ? layer.N : 1);
            layer.keeps_branch = is_required(LEARNED_BRANCH_SCALE);
            layer.keeps_skip = is_required(LEARNED_SKIP_SCALE);
            layer.is_dropped = seed && drops_all(layer, M);
            if (layer.is_dropped) clear_gradients(layer);
            const bool is_needed = depth == 0 && l + 1 == planned;  // there is to be one
            if (is_needed || !layer.is_dropped || !is_passed_by(layer, slots[LEARNED_SKIP_SCALE] >= 0)) depth++;
        }
    }

    static bool drops_all(const Layer &layer, int64_t M) {
        for (int64_t row = 0; row < M; row++)
            if (is_kept(layer, row)) return false;
        return true;
    }

    // Whether what is left of a dropped layer is the row as it came.
    static bool is_passed_by(const Layer &layer, bool learns_skip_scale) {
        return layer.skip == Skip::identity && !layer.activates_sum() && !learns_skip_scale && layer.skip_scale == 1;
    }

    // Those of a dropped layer's branch, here and now; W's nobody else is to compute.
    void clear_gradients(Layer &layer) const {
        auto clear = [&](void *to, int64_t count) {
            if (to) std::memset(to, 0, size_t(count) * size_t(c10::elementSize(dtype)));
        };
        clear(layer.dweight, layer.N * layer.K), clear(layer.dbias, layer.N);
        clear(layer.dbranch_scale, layer.channel_scale ? layer.N : 1);
        layer.dweight = nullptr;
    }

    at::ScalarType dtype;

    // What a deep network's tensors say of themselves is spread over more memory than its weights take.
    static constexpr int64_t AHEAD = 4;
    static void prefetch(const int64_t *words, at::TensorList parameters) {
        for (const int64_t slot : {words[int(SLOTS) + WEIGHT], words[int(SLOTS) + BIAS]}) {
            if (slot < 0) continue;
            const auto *tensor = reinterpret_cast<const char *>(parameters[size_t(slot)].unsafeGetTensorImpl());
            for (size_t i = 0; i < sizeof(c10::TensorImpl); i += 64) __builtin_prefetch(tensor + i);
        }
    }

    // A parameter may have been given new data since the plan was made. `run` layers are stacked in it (0: it is one's
    // own); vectors of a run may lie flat.
    static bool fits(const Tensor &tensor, at::ScalarType dtype, int64_t size, int64_t dims, int64_t run) {
        const int64_t dim = tensor.dim();
        return tensor.is_cpu() && tensor.scalar_type() == dtype && (dim == dims + int64_t(run > 0) || (dims == 1 && dim == 1)) &&
               tensor.numel() == size * std::max<int64_t>(run, 1);
    }
    [[noreturn, gnu::cold]] static void refuse(const Tensor &tensor, at::ScalarType dtype, int64_t size, Slot slot, int64_t layer) {
        TORCH_CHECK(false, "parameter ", int(slot), " of layer ", layer, " has changed its shape, dtype or device: ", size,
                    " numbers of ", dtype, " expected, got ", tensor.sizes(), " of ", tensor.scalar_type(), " on ",
                    tensor.device());
    }
};

// ------------------------------------------------------------------------------------------------ calling

// Rows of a matrix with unit inner stride, without a copy where the tensor allows.
inline Tensor rows_of(const Tensor &given, int64_t *ld) {
    const Tensor tensor = given.is_neg() ? given.resolve_neg() : given;
    const int64_t columns = tensor.size(-1);
    Tensor matrix = tensor.dim() == 2 ? tensor : tensor.reshape({-1, columns});
    if (matrix.stride(1) != 1 || (matrix.size(0) > 1 && matrix.stride(0) < columns)) matrix = matrix.contiguous();
    *ld = std::max(matrix.stride(0), columns);
    return matrix;
}

// Calls engine<T> for the tensors' dtype.
template <class Work>
auto by_dtype(at::ScalarType dtype, const Work &work) {
    switch (dtype) {
        case at::kFloat: return work(float());
        case at::kDouble: return work(double());
        case at::kBFloat16: return work(bfloat16());
        default: TORCH_CHECK(false, "float32, float64 or bfloat16 expected, got ", dtype);
    }
}

// As many threads as torch allows and the work can keep busy for longer than it takes to wake them.
inline int useful_threads(const Call &call) {
    constexpr double FLOPS_PER_NS = 100, ELEMENTS_PER_NS = 3, WORTH_A_THREAD_NS = 5000;
    double ns_per_row = 0;
    for (int64_t l = 0; l < call.depth; l++) {
        const Layer &layer = call.layers[l];
        ns_per_row += 2 * double(layer.N) * double(layer.K) / FLOPS_PER_NS + double(layer.N) / ELEMENTS_PER_NS;
    }
    const double worth = std::floor(ns_per_row * double(call.M) / WORTH_A_THREAD_NS);
    return int(std::clamp(worth, 1.0, double(at::get_num_threads())));
}

struct Arguments {
    Tensor x, residual;
    Call call;

    Arguments(const Network &network, const Tensor &x_, const std::optional<Tensor> &residual_, int64_t way) {
        const Layer &first = network.layers[0];
        TORCH_CHECK(x_.device().is_cpu() && x_.dim() > 0 && x_.size(-1) == first.K, "x must be [..., ", first.K,
                    "] on the CPU, got ", x_.sizes(), " on ", x_.device());
        call = {};
        x = rows_of(x_, &call.ldx);
        call.M = x.size(0);
        call.x = x.const_data_ptr();
        if (residual_) {
            TORCH_CHECK(residual_->device().is_cpu() && residual_->scalar_type() == x.scalar_type() &&
                            residual_->dim() == x_.dim() && residual_->size(-1) == first.N &&
                            residual_->sizes().slice(0, size_t(x_.dim() - 1)) == x_.sizes().slice(0, size_t(x_.dim() - 1)),
                        "residual must be [..., ", first.N, "] on the CPU, with the rows and dtype of x, got ",
                        residual_->sizes());
            residual = rows_of(*residual_, &call.ldr);
            call.residual = residual.const_data_ptr();
        }
        call.layers = network.layers.get(), call.depth = network.depth;
        call.way = Way(way);
        call.threads = at::in_parallel_region() ? 1 : useful_threads(call);
        call.has_brgemm = has_brgemm(x.scalar_type());
        TORCH_CHECK(call.has_brgemm || x.scalar_type() != at::kBFloat16,
                    "bfloat16 needs brgemm, which torch.backends.mkldnn.enabled has switched off, or this processor lacks");
    }
};

inline Tensor output_like(const Tensor &x, int64_t columns) {
    c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = columns;
    return fresh(sizes, x.scalar_type());
}

inline Tensor run_forward(const Tensor &plan, at::TensorList parameters, const Tensor &x, const std::optional<Tensor> &residual,
                          const std::optional<Tensor> &seeds, int64_t way, c10::ArrayRef<bool> required, Tensor *kept) {
    const Network network(plan, parameters, x, seeds, {}, required);
    const Arguments arguments(network, x, residual, way);
    Tensor y = output_like(x, network.layers[network.depth - 1].N);
    by_dtype(x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        if (kept) *kept = fresh({kept_bytes<T>(arguments.call)}, at::kByte);
        forward<T>(arguments.call, y.mutable_data_ptr(), kept ? kept->mutable_data_ptr() : nullptr);
    });
    return y;
}

// One gradient per wish, undefined where there is none; required: as forward was told. record: to be filled with a row for each
// layer.
inline std::vector<Tensor> run_backward(const Tensor &plan, at::TensorList parameters, const Tensor &x,
                                        const std::optional<Tensor> &residual, const std::optional<Tensor> &seeds,
                                        const Tensor &kept, c10::ArrayRef<bool> required, const Tensor &g, int64_t way,
                                        c10::ArrayRef<bool> wanted, double unscale = 0, Tensor *record = nullptr) {
    TORCH_CHECK(wanted.size() == parameters.size() + 2, "one wish per gradient expected");
    std::vector<Tensor> found(wanted.size());
    if (wanted[0]) found[0] = fresh(x.sizes(), x.scalar_type());
    if (wanted[1] && residual) found[1] = fresh(residual->sizes(), residual->scalar_type());
    fresh_like(parameters, wanted.slice(2), found.data() + 2);
    const Network network(plan, parameters, x, seeds, at::TensorList(found).slice(2), required);
    Arguments arguments(network, x, residual, way);
    if (record) {
        *record = at::zeros({plan.size(0), recorded::COLUMNS}, at::kDouble);
        arguments.call.record = record->mutable_data_ptr<double>(), arguments.call.unscale = unscale;
    }
    int64_t ldg;
    const Tensor rows = rows_of(g, &ldg);
    by_dtype(x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        TORCH_CHECK(g.scalar_type() == x.scalar_type(), "g must be ", x.scalar_type(), ", got ", g.scalar_type());
        const bool is_kept = kept.defined() && kept.numel() > 0;
        TORCH_CHECK(!is_kept || kept.numel() == kept_bytes<T>(arguments.call), "backward expects ",
                    kept_bytes<T>(arguments.call), " bytes from forward, got ", kept.numel());
        auto address = [](const Tensor &tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; };
        backward<T>(arguments.call, rows.const_data_ptr(), ldg, is_kept ? kept.const_data_ptr() : nullptr,
                    address(found[0]), address(found[1]));
    });
    return found;
}

}  // namespace
}  // namespace fusedres
