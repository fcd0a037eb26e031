// A whole network's part in PyTorch's graph: one node, at the price of one operation and of its parameters' edges.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>

#include "tensors.h"

namespace fusedres {
namespace {

// A network and its tensors, held here so that a call need not hand them over one by one.
struct Bound {
    Tensor plan;
    std::vector<Tensor> parameters;
    int64_t handle;
};

// One call of a network: all but its x.
struct Run {
    const Bound &bound;
    const std::optional<Tensor> &seeds;
    int64_t way;
    bool keep;
    int64_t watch;  // the number by which the gradients of its layers are recorded; 0: they are not
};

// Whether the engine may read the tensor: nobody bends the call or looks on, and nothing stands for several tensors.
inline bool is_plain(const Tensor &tensor) {
    using c10::DispatchKey;
    constexpr c10::DispatchKeySet usual({DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::ADInplaceOrView,
                                         DispatchKey::AutocastCPU, DispatchKey::BackendSelect, DispatchKey::Negative});
    const c10::impl::LocalDispatchKeySet here = c10::impl::tls_local_dispatch_key_set();
    return (((tensor.key_set() | here.included_) - here.excluded_).raw_repr() & ~usual.raw_repr()) == 0;
}

class ResidualNetwork : public torch::autograd::Function<ResidualNetwork> {
    using Context = torch::autograd::AutogradContext;
    enum Saved : size_t { PLAN, X, SEEDS, KEPT, PARAMETERS };

  public:
    static Tensor forward(Context *context, const Tensor &x, at::TensorList parameters, const Run &run) {
        Wishes required{x.requires_grad(), false};
        for (const Tensor &parameter : parameters) required.push_back(parameter.requires_grad());
        Tensor kept;
        Tensor y = run_forward(run.bound.plan, parameters, x, std::nullopt, run.seeds, run.way, required, run.keep ? &kept : nullptr);
        std::vector<Tensor> saved{run.bound.plan, x, run.seeds.value_or(Tensor()), std::move(kept)};
        saved.insert(saved.end(), parameters.begin(), parameters.end());
        context->save_for_backward(std::move(saved));
        context->saved_data["call"] =
            c10::ivalue::Tuple::create(run.way, std::string(required.begin(), required.end()), run.bound.handle, run.watch);
        return y;
    }

    static std::vector<Tensor> backward(Context *context, const std::vector<Tensor> &gradients) {
        const Tensor &g = gradients[0];
        const std::vector<Tensor> saved = context->get_saved_variables();
        const at::TensorList parameters = at::TensorList(saved).slice(PARAMETERS);
        const Tensor &x = saved[X];
        const auto &call = context->saved_data["call"].toTupleRef().elements();
        std::optional<Tensor> seeds;
        if (saved[SEEDS].defined()) seeds = saved[SEEDS];
        Wishes wanted{context->needs_input_grad(0), false};
        for (size_t i = 0; i < parameters.size(); i++) wanted.push_back(context->needs_input_grad(1 + i));

        std::vector<Tensor> found;
        if (c10::GradMode::is_enabled() || !is_plain(g) || !is_plain(x)) {
            wanted.erase(wanted.begin() + 1);
            found = by_operator(g, x, parameters, seeds, saved[PLAN], wanted, is_plain(g) && is_plain(x) ? call[2].toInt() : 0,
                                call[3].toInt());
        } else {
            const std::string &given = call[1].toStringRef();
            const Wishes required(given.begin(), given.end());
            const int64_t watch = call[3].toInt();
            const double unscale = watch ? asked("fusedres::unscale", {watch}).toDouble() : 0;
            Tensor record;
            found = run_backward(saved[PLAN], parameters, x, std::nullopt, seeds, saved[KEPT], required, g, call[0].toInt(),
                                 wanted, unscale, unscale ? &record : nullptr);
            if (unscale) asked("fusedres::note", {record.unsqueeze(0), watch});
            found.erase(found.begin() + 1);
        }
        found.emplace_back();  // of Run
        return found;
    }

  private:
    // What an operator that Python has defined answers, if anything.
    static c10::IValue asked(const char *name, std::vector<c10::IValue> stack) {
        c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
        return stack.empty() ? c10::IValue() : stack.front();
    }

    // By the operator that torch.vmap batches and dispatch modes see; or, to be differentiated again, through the formula,
    // told which network this is (0: by the operator).
    static std::vector<Tensor> by_operator(const Tensor &g, const Tensor &x, at::TensorList parameters,
                                           const std::optional<Tensor> &seeds, const Tensor &plan,
                                           c10::ArrayRef<bool> wanted, int64_t network, int64_t watch) {
        const c10::List<bool> wishes(wanted);
        const auto [codes, numbers] = encoded(plan);
        std::vector<c10::IValue> stack{g, x, c10::List<Tensor>(parameters), seeds, codes, numbers, watch, wishes};
        if (network) stack.emplace_back(network);
        const char *name = network ? "fusedres::differentiable_backward" : "fusedres::residual_network_backward";
        c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
        const c10::List<Tensor> some = stack.at(0).toTensorList();
        std::vector<Tensor> found(wanted.size());
        for (size_t i = 0, next = 0; i < wanted.size(); i++)
            if (wanted[i]) found[i] = some.get(next++);
        return found;
    }
};

}  // namespace
}  // namespace fusedres
