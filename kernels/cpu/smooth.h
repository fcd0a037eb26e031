// φ as PyTorch differentiates it again and again: each derivative, and its products, by the engine in one pass.
#pragma once

#define AT_PER_OPERATOR_HEADERS
#include <ATen/TensorOperators.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/tanh.h>
#include <torch/csrc/autograd/custom_function.h>

#include "node.h"
#include "tensors.h"

namespace fusedres {
namespace {

// φ''' by PyTorch's own operations, which it differentiates without end.
inline Tensor third_derivative(Activation activation, const Tensor &z) {
    switch (activation) {
        case Activation::gelu: return z * (z * z - 4) * at::exp(-0.5 * z * z) * 0.39894228040143268;
        case Activation::silu:
        case Activation::gelu_tanh: {
            const bool is_silu = activation == Activation::silu;
            const double a = is_silu ? 1 : 1.5957691216057308, cubic = is_silu ? 0 : 0.044715;
            const Tensor zz = z * z, v = a * z * (1 + cubic * zz), p = at::sigmoid(v) * at::sigmoid(-v), w = -at::tanh(0.5 * v);
            const Tensor v1 = a * (1 + 3 * cubic * zz), v2 = 6 * a * cubic * z;
            const Tensor second = w * v1 * v1 + v2, third = (1 - 6 * p) * v1 * v1 * v1 + 3 * w * v1 * v2 + 6 * a * cubic;
            return p * (z * third + 3 * second);
        }
        default: return -at::cos(z);  // of sin
    }
}

// φ⁽ᵏ⁾(z) f₁ … fₖ of dense tensors of one shape.
class Smooth : public torch::autograd::Function<Smooth> {
    using Context = torch::autograd::AutogradContext;

  public:
    static constexpr int HIGHEST = 2;  // whose slope the engine still has

    static Tensor forward(Context *context, const Tensor &z, at::TensorList factors, int64_t activation) {
        std::vector<Tensor> saved{z};
        saved.insert(saved.end(), factors.begin(), factors.end());
        context->saved_data["activation"] = activation;
        Tensor p = fresh(z.sizes(), z.scalar_type());
        Products call = described(saved, activation);
        call.p = p.mutable_data_ptr<float>();
        multiply(call);
        context->save_for_backward(std::move(saved));
        return p;
    }

    static std::vector<Tensor> backward(Context *context, const std::vector<Tensor> &gradients) {
        const std::vector<Tensor> saved = context->get_saved_variables();
        const int64_t activation = context->saved_data["activation"].toInt();
        const Tensor v = gradients[0].resolve_neg().contiguous();
        std::vector<Tensor> found(saved.size() + 1);  // the last of `activation`
        auto is_wanted = [&](size_t i) { return context->needs_input_grad(i); };
        if (c10::GradMode::is_enabled() || !is_plain(v)) {
            for (size_t i = 0; i < saved.size(); i++) {
                if (!is_wanted(i)) continue;
                std::vector<Tensor> factors;
                for (size_t j = 1; j < saved.size(); j++)
                    if (j != i) factors.push_back(saved[j]);
                factors.push_back(v);
                found[i] = product(saved[0], factors, activation);
            }
            return found;
        }
        Products call = described(saved, activation);
        call.v = v.const_data_ptr<float>();
        auto fresh_for = [&](size_t i) -> float * {
            if (i >= saved.size() || !is_wanted(i)) return nullptr;
            found[i] = fresh(v.sizes(), v.scalar_type());
            return found[i].mutable_data_ptr<float>();
        };
        call.dz = fresh_for(0), call.dfactors[0] = fresh_for(1), call.dfactors[1] = fresh_for(2);
        multiply(call);
        return found;
    }

    // The same for any number of factors, differentiable, and where torch.vmap batches them.
    static Tensor product(const Tensor &z, const std::vector<Tensor> &factors, int64_t activation) {
        const bool has_slope = factors.size() <= size_t(HIGHEST);
        const bool are_plain = std::all_of(factors.begin(), factors.end(), [](const Tensor &factor) { return is_plain(factor); });
        if (has_slope && are_plain) return Smooth::apply(z, at::TensorList(factors), activation);
        const std::vector<Tensor> ones(factors.size(), at::ones_like(z));
        Tensor p = has_slope ? Smooth::apply(z, at::TensorList(ones), activation) : third_derivative(Activation(activation), z);
        for (const Tensor &factor : factors) p = p * factor;
        return p;
    }

  private:
    static Products described(const std::vector<Tensor> &saved, int64_t activation) {
        constexpr int64_t WORTH_A_THREAD = 1 << 14;
        Products call = {};
        call.activation = Activation(activation);
        call.order = int(saved.size()) - 1;
        call.count = saved[0].numel();
        call.threads = at::in_parallel_region() ? 1 : int(std::clamp<int64_t>(call.count / WORTH_A_THREAD, 1, at::get_num_threads()));
        call.z = saved[0].const_data_ptr<float>();
        for (int i = 0; i < call.order; i++) call.factors[i] = saved[size_t(i) + 1].const_data_ptr<float>();
        return call;
    }
};

// φ(z) of gelu, silu and sin. Others' derivatives PyTorch makes of their results, which is less work than ours would be.
inline Tensor smooth(const Tensor &z, int64_t activation) {
    constexpr Activation HAS[] = {Activation::gelu, Activation::gelu_tanh, Activation::silu, Activation::sin};
    TORCH_CHECK(std::find(std::begin(HAS), std::end(HAS), Activation(activation)) != std::end(HAS), "activation ", activation,
                " has no derivatives here");
    TORCH_CHECK(z.is_cpu() && z.scalar_type() == at::kFloat, "float32 on the CPU expected, got ", z.scalar_type(), " on ", z.device());
    return Smooth::product(z.resolve_neg().contiguous(), {}, activation);
}

}  // namespace
}  // namespace fusedres
