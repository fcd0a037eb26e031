// The engine as PyTorch operators: tensors become addresses, checked against the plan on every call.
#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <dlfcn.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <mutex>
#include <unordered_map>

#include "memory.h"
#include "network.h"
#include "product.h"

namespace fusedres {

// Names as the compiler mangles them: a torch without one leaves null, and the engine its own products.
#define BRGEMM(A) reinterpret_cast<Brgemm>(dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas6brgemmEllllllbPK" A "Pfb"))
Brgemm brgemm_float = BRGEMM("fS3_");
Brgemm brgemm_bfloat16 = BRGEMM("N3c108BFloat16ES5_");
static void no_release(bool) {}
void (*brgemm_release)(bool) = [] {
    void *found = dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas14brgemm_releaseEb");
    return found ? reinterpret_cast<void (*)(bool)>(found) : no_release;
}();

namespace {

using Tensor = at::Tensor;
using Parameters = c10::List<std::optional<Tensor>>;

// Whether brgemm works here: torch raises where the processor, or oneDNN as it was built, does not have it.
bool works(Brgemm brgemm, bool is_vnni) {
    if (!brgemm) return false;
    try {
        float A[4] = {}, B[4] = {}, C[4] = {1, 1, 1, 1};
        brgemm(2, 2, 2, 2, 2, 2, false, A, B, C, is_vnni);
        brgemm_release(is_vnni);
        return C[0] == 0 && C[3] == 0;
    } catch (...) {
        return false;
    }
}

bool has_brgemm(at::ScalarType dtype) {
    if (!at::globalContext().userEnabledMkldnn()) return false;
    if (dtype == at::kFloat) {
        static const bool works_in_float = works(brgemm_float, false);
        return works_in_float;
    }
    if (dtype == at::kBFloat16) {
        static const bool works_in_bfloat16 = works(brgemm_bfloat16, true);
        return works_in_bfloat16;
    }
    return false;
}

int64_t capabilities() { return int64_t(has_brgemm(at::kFloat)) + 2 * int64_t(has_brgemm(at::kBFloat16)); }

bool is_fresh_memory_filled() {
    const auto &context = at::globalContext();
    return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

// at::empty without its dispatch, which costs more than a small layer; with it where torch fills fresh memory, as tests ask.
Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
    if (is_fresh_memory_filled()) return at::empty(sizes, at::TensorOptions().dtype(dtype));
    return Tensor(at::detail::empty_cpu(sizes, dtype));
}

// Bytes for backward: out of the pool where it would take them back, since fresh pages cost more than what is kept there.
Tensor memory_to_keep(int64_t bytes) {
    if (bytes < Pool::SMALLEST || bytes > Pool::MOST || is_fresh_memory_filled()) {
        Tensor kept = fresh({bytes}, at::kByte);
        in_huge_pages(kept.mutable_data_ptr(), bytes);
        return kept;
    }
    int64_t taken = bytes;
    void *memory = Pool::instance().take(&taken);
    auto give_back = [taken](void *memory) { Pool::instance().give(memory, taken); };
    return at::from_blob(memory, {bytes}, give_back, at::TensorOptions().dtype(at::kByte));
}

// ------------------------------------------------------------------------------------------------ the plan

constexpr int64_t WORDS = 16;
enum Word { N, K, ACTIVATION, IS_POST, SKIP, SKIP_SCALE, BRANCH_SCALE, DROP_THRESHOLD, KEEP_SCALE, SLOTS, INDEX = 15 };
enum Slot { WEIGHT, BIAS, PROJECTION, PROJECTION_BIAS, LEARNED_SKIP_SCALE, LEARNED_BRANCH_SCALE };

double as_double(int64_t bits) {
    double value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

double number(const Tensor &tensor, int64_t index) {
    switch (tensor.scalar_type()) {
        case at::kFloat: return tensor.const_data_ptr<float>()[index];
        case at::kDouble: return tensor.const_data_ptr<double>()[index];
        default: return tensor.const_data_ptr<at::BFloat16>()[index];
    }
}

// A network's parameters as the kernels read them: contiguous, on the CPU, of one dtype.
struct Given {
    Tensor plan;
    std::vector<Tensor> parameters;

    Given(const Tensor &plan, const Parameters &from) : plan(plan) {
        parameters.reserve(from.size());
        for (const std::optional<Tensor> parameter : from) parameters.push_back(parameter ? parameter->resolve_neg() : Tensor());
    }
};

struct Network {
    std::vector<Layer> layers;
    std::vector<Tensor> copies;  // of parameters that are not contiguous

    Network(const Given &given, at::ScalarType dtype, const std::optional<Tensor> &seeds, const std::vector<Tensor> *gradients,
            c10::ArrayRef<bool> wanted)
        : layers(size_t(given.plan.size(0))) {
        const int64_t *words = given.plan.const_data_ptr<int64_t>();
        const int64_t *seed = seeds ? seeds->const_data_ptr<int64_t>() : nullptr;
        for (size_t l = 0; l < layers.size(); l++, words += WORDS) {
            Layer &layer = layers[l];
            layer = {};
            layer.N = words[N], layer.K = words[K];
            layer.activation = Activation(words[ACTIVATION]);
            layer.is_post = words[IS_POST] != 0;
            layer.skip = Skip(words[SKIP]);
            layer.skip_scale = as_double(words[SKIP_SCALE]), layer.branch_scale = as_double(words[BRANCH_SCALE]);
            layer.keep_scale = as_double(words[KEEP_SCALE]);
            if (seed) layer.drop_threshold = uint64_t(words[DROP_THRESHOLD]), layer.seed = uint64_t(seed[l]);

            const int64_t *slots = words + SLOTS, index = std::max<int64_t>(words[INDEX], 0);
            const bool is_stacked = words[INDEX] >= 0;
            auto tensor = [&](Slot slot) -> const Tensor * {
                return slots[slot] < 0 ? nullptr : &given.parameters[size_t(slots[slot])];
            };
            auto address = [&](Slot slot, int64_t size, int64_t dims) -> const void * {
                const Tensor *found = tensor(slot);
                if (!found) return nullptr;
                check(*found, dtype, size, dims, is_stacked, slot, l);
                const Tensor *dense = found;
                if (!found->is_contiguous()) dense = &copies.emplace_back(found->contiguous());
                return static_cast<const char *>(dense->const_data_ptr()) + index * size * int64_t(dense->element_size());
            };
            auto gradient = [&](Slot slot, int64_t size) -> void * {
                if (!gradients || slots[slot] < 0 || !(*gradients)[size_t(slots[slot])].defined()) return nullptr;
                const Tensor &to = (*gradients)[size_t(slots[slot])];
                return static_cast<char *>(to.mutable_data_ptr()) + index * size * int64_t(to.element_size());
            };
            auto is_wanted = [&](Slot slot) { return !wanted.empty() && slots[slot] >= 0 && wanted[size_t(slots[slot]) + 2]; };

            layer.weight = address(WEIGHT, layer.N * layer.K, 2), layer.bias = address(BIAS, layer.N, 1);
            layer.projection = address(PROJECTION, layer.N * layer.K, 2);
            layer.projection_bias = address(PROJECTION_BIAS, layer.N, 1);
            if (const Tensor *scale = tensor(LEARNED_SKIP_SCALE)) {
                check(*scale, dtype, 1, 0, is_stacked, LEARNED_SKIP_SCALE, l);
                layer.skip_scale = number(*scale, is_stacked ? index * scale->stride(0) : 0);
            }
            if (const Tensor *scale = tensor(LEARNED_BRANCH_SCALE)) {
                if (scale->dim() == (is_stacked ? 2 : 1)) {
                    layer.channel_scale = address(LEARNED_BRANCH_SCALE, layer.N, 1);
                } else {
                    check(*scale, dtype, 1, 0, is_stacked, LEARNED_BRANCH_SCALE, l);
                    layer.branch_scale = number(*scale, is_stacked ? index * scale->stride(0) : 0);
                }
            }
            layer.dweight = gradient(WEIGHT, layer.N * layer.K), layer.dbias = gradient(BIAS, layer.N);
            layer.dprojection = gradient(PROJECTION, layer.N * layer.K);
            layer.dprojection_bias = gradient(PROJECTION_BIAS, layer.N);
            layer.dskip_scale = gradient(LEARNED_SKIP_SCALE, 1);
            layer.dbranch_scale = gradient(LEARNED_BRANCH_SCALE, layer.channel_scale ? layer.N : 1);
            layer.keeps_branch = is_wanted(LEARNED_BRANCH_SCALE);
            layer.keeps_skip = is_wanted(LEARNED_SKIP_SCALE);
        }
    }

    // A parameter may have been given new data since the plan was made.
    static void check(const Tensor &tensor, at::ScalarType dtype, int64_t size, int64_t dims, bool is_stacked, Slot slot,
                      size_t layer) {
        TORCH_CHECK(tensor.device().is_cpu() && tensor.scalar_type() == dtype &&
                        tensor.dim() == dims + int64_t(is_stacked) &&
                        tensor.numel() == size * (is_stacked ? tensor.size(0) : 1),
                    "parameter ", int(slot), " of layer ", layer, " has changed its shape, dtype or device: ", size,
                    " numbers of ", dtype, " expected, got ", tensor.sizes(), " of ", tensor.scalar_type(), " on ",
                    tensor.device());
    }
};

// ------------------------------------------------------------------------------------------------ calling

// Rows of a matrix with unit inner stride, without a copy where the tensor's strides allow.
Tensor rows_of(const Tensor &tensor, int64_t *ld) {
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
int useful_threads(const Call &call) {
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
        const Layer &first = network.layers.front();
        TORCH_CHECK(x_.device().is_cpu() && x_.dim() > 0 && x_.size(-1) == first.K, "x must be [..., ", first.K,
                    "] on the CPU, got ", x_.sizes(), " on ", x_.device());
        call = {};
        x = rows_of(x_, &call.ldx);
        call.M = x.size(0);
        call.x = x.const_data_ptr();
        if (residual_) {
            TORCH_CHECK(residual_->scalar_type() == x.scalar_type() && residual_->size(-1) == first.N &&
                            residual_->numel() == call.M * first.N,
                        "residual must be [..., ", first.N, "] with the rows and dtype of x, got ", residual_->sizes());
            residual = rows_of(*residual_, &call.ldr);
            call.residual = residual.const_data_ptr();
        }
        call.layers = network.layers.data(), call.depth = int64_t(network.layers.size());
        call.way = Way(way);
        call.threads = at::in_parallel_region() ? 1 : useful_threads(call);
        call.has_brgemm = has_brgemm(x.scalar_type());
        TORCH_CHECK(call.has_brgemm || x.scalar_type() != at::kBFloat16,
                    "bfloat16 needs brgemm, which torch.backends.mkldnn.enabled has switched off, or this processor lacks");
    }
};

Tensor output_like(const Tensor &x, int64_t columns) {
    c10::SmallVector<int64_t, 5> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = columns;
    return fresh(sizes, x.scalar_type());
}

Tensor run_forward(const Given &given, const Tensor &x, const std::optional<Tensor> &residual,
                   const std::optional<Tensor> &seeds, int64_t way, c10::ArrayRef<bool> wanted, Tensor *kept) {
    const Network network(given, x.scalar_type(), seeds, nullptr, wanted);
    const Arguments arguments(network, x, residual, way);
    Tensor y = output_like(x, network.layers.back().N);
    in_huge_pages(y.mutable_data_ptr(), int64_t(y.nbytes()));
    by_dtype(x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        if (kept) {
            *kept = memory_to_keep(kept_bytes<T>(arguments.call));
        }
        forward<T>(arguments.call, y.mutable_data_ptr(), kept ? kept->mutable_data_ptr() : nullptr);
    });
    return y;
}

std::tuple<Tensor, Tensor> forward_operator(const Tensor &plan, const Parameters &parameters, const Tensor &x,
                                            const std::optional<Tensor> &residual, const std::optional<Tensor> &seeds,
                                            int64_t way, c10::List<bool> wanted, bool keep) {
    const Given given(plan, parameters);
    c10::SmallVector<bool, 64> wants(wanted.begin(), wanted.end());
    Tensor kept;
    Tensor y = run_forward(given, x, residual, seeds, way, wants, keep ? &kept : nullptr);
    return {y, keep ? kept : fresh({0}, at::kByte)};
}

std::vector<Tensor> backward_operator(const Tensor &plan, const Parameters &parameters, const Tensor &x,
                                      const std::optional<Tensor> &residual, const std::optional<Tensor> &seeds,
                                      const Tensor &kept, const Tensor &g, int64_t way, c10::List<bool> wanted) {
    const Given given(plan, parameters);
    const c10::SmallVector<bool, 64> wants(wanted.begin(), wanted.end());
    TORCH_CHECK(wants.size() == given.parameters.size() + 2, "one wish per gradient expected");
    std::vector<Tensor> gradients(given.parameters.size()), found;
    for (size_t i = 0; i < gradients.size(); i++)
        if (wants[i + 2]) gradients[i] = fresh(given.parameters[i].sizes(), given.parameters[i].scalar_type());
    const Network network(given, x.scalar_type(), seeds, &gradients, wants);
    const Arguments arguments(network, x, residual, way);
    Tensor dx, dresidual;
    if (wants[0]) found.push_back(dx = fresh(x.sizes(), x.scalar_type()));
    if (wants[1]) found.push_back(dresidual = fresh(residual->sizes(), residual->scalar_type()));
    found.reserve(gradients.size() + 2);
    for (const Tensor &gradient : gradients)
        if (gradient.defined()) found.push_back(gradient);
    int64_t ldg;
    const Tensor rows = rows_of(g, &ldg);
    by_dtype(x.scalar_type(), [&](auto type) {
        using T = decltype(type);
        TORCH_CHECK(g.scalar_type() == x.scalar_type(), "g must be ", x.scalar_type(), ", got ", g.scalar_type());
        TORCH_CHECK(kept.numel() == 0 || kept.numel() == kept_bytes<T>(arguments.call), "backward expects ",
                    kept_bytes<T>(arguments.call), " bytes from forward, got ", kept.numel());
        backward<T>(arguments.call, rows.const_data_ptr(), ldg, kept.numel() ? kept.const_data_ptr() : nullptr,
                    dx.defined() ? dx.mutable_data_ptr() : nullptr,
                    dresidual.defined() ? dresidual.mutable_data_ptr() : nullptr);
    });
    return found;
}

// ------------------------------------------------------------------------------------------------ bound networks

// Networks whose tensors are held here, so that a call need not hand them over one by one.
std::mutex bound_mutex;
std::unordered_map<int64_t, std::shared_ptr<const Given>> bound;
int64_t next_handle = 1;

int64_t bind(const Tensor &plan, const Parameters &parameters) {
    auto given = std::make_shared<const Given>(plan, parameters);
    std::lock_guard<std::mutex> lock(bound_mutex);
    bound.emplace(next_handle, std::move(given));
    return next_handle++;
}

void unbind(int64_t handle) {
    std::shared_ptr<const Given> last;  // freed after the lock
    std::lock_guard<std::mutex> lock(bound_mutex);
    auto found = bound.find(handle);
    if (found == bound.end()) return;
    last = std::move(found->second);
    bound.erase(found);
}

Tensor infer(int64_t handle, const Tensor &x, int64_t way) {
    std::shared_ptr<const Given> given;
    {
        std::lock_guard<std::mutex> lock(bound_mutex);
        auto found = bound.find(handle);
        TORCH_CHECK(found != bound.end(), "network ", handle, " is not bound");
        given = found->second;
    }
    return run_forward(*given, x, std::nullopt, std::nullopt, way, {}, nullptr);
}

}  // namespace
}  // namespace fusedres

TORCH_LIBRARY(fusedres_cpu, library) {
    library.def("capabilities() -> int", fusedres::capabilities);
    library.def("bind(Tensor plan, Tensor?[] parameters) -> int");
    library.def("unbind(int network) -> ()", fusedres::unbind);
    library.def("infer(int network, Tensor x, int way) -> Tensor");
    library.def(
        "forward(Tensor plan, Tensor?[] parameters, Tensor x, Tensor? residual, Tensor? seeds, int way, bool[] wanted, "
        "bool keep) -> (Tensor, Tensor)");
    library.def(
        "backward(Tensor plan, Tensor?[] parameters, Tensor x, Tensor? residual, Tensor? seeds, Tensor kept, Tensor g, "
        "int way, bool[] wanted) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(fusedres_cpu, CPU, library) {
    library.impl("bind", fusedres::bind);
    library.impl("infer", fusedres::infer);
    library.impl("forward", fusedres::forward_operator);
    library.impl("backward", fusedres::backward_operator);
}
