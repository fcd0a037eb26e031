// A network's part in PyTorch's graph, of one layer or many: one node, at the price of one operation and of its parameters'
// edges.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mul.h>
#include <torch/csrc/autograd/custom_function.h>

#include "tensors.h"

namespace fusedres {
namespace {

// A network and its tensors, held here so that a call need not hand them over one by one.
struct Bound {
    Tensor plan;
    std::vector<Tensor> parameters;
};

constexpr int64_t ONE_LAYER = -1;  // the handle of a layer that is called by itself, bound to nothing

// One call of a network: all but its tensors.
struct Run {
    const Tensor &plan;
    int64_t handle;
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
    enum Saved : size_t { PLAN, X, SEEDS, KEPT, RESIDUAL, PARAMETERS };

  public:
    // residual: of a network of one layer. It is kept where backward reads it.
    static Tensor forward(Context *context, const Tensor &x, at::TensorList parameters, const std::optional<Tensor> &residual,
                          const Run &run) {
        Wishes required{x.requires_grad(), residual && residual->requires_grad()};
        for (const Tensor &parameter : parameters) required.push_back(parameter.requires_grad());
        Tensor kept;
        Tensor y = run_forward(run.plan, parameters, x, residual, run.seeds, run.way, required, run.keep ? &kept : nullptr);
        std::vector<Tensor> saved{run.plan, x, run.seeds.value_or(Tensor()), std::move(kept),
                                  residual && reads_residual(run.plan) ? *residual : Tensor()};
        saved.insert(saved.end(), parameters.begin(), parameters.end());
        context->save_for_backward(std::move(saved));
        context->saved_data["call"] =
            c10::ivalue::Tuple::create(run.way, std::string(required.begin(), required.end()), run.handle, run.watch);
        return y;
    }

    static std::vector<Tensor> backward(Context *context, const std::vector<Tensor> &gradients) {
        const Tensor &g = gradients[0];
        const std::vector<Tensor> saved = context->get_saved_variables();
        const at::TensorList parameters = at::TensorList(saved).slice(PARAMETERS);
        const Tensor &x = saved[X];
        const auto &call = context->saved_data["call"].toTupleRef().elements();
        std::optional<Tensor> seeds, residual;
        if (saved[SEEDS].defined()) seeds = saved[SEEDS];
        if (saved[RESIDUAL].defined()) residual = saved[RESIDUAL];
        const bool has_residual = takes_residual(saved[PLAN]);
        Wishes wanted{context->needs_input_grad(0), has_residual && context->needs_input_grad(1 + parameters.size())};
        for (size_t i = 0; i < parameters.size(); i++) wanted.push_back(context->needs_input_grad(1 + i));

        std::vector<Tensor> found;
        if (const bool sees_numbers = is_plain(g) && is_plain(x); c10::GradMode::is_enabled() || !sees_numbers) {
            if (has_residual && !residual) residual = g.new_empty({}).expand(g.sizes());
            found = by_operator(g, x, parameters, residual, seeds, saved[PLAN], wanted, call[2].toInt(), sees_numbers,
                                call[3].toInt());
        } else {
            const std::string &given = call[1].toStringRef();
            const Wishes required(given.begin(), given.end());
            const int64_t watch = call[3].toInt();
            const double unscale = watch ? asked("fusedres::unscale", {watch}).toDouble() : 0;
            const bool is_passed_by = has_residual && !residual && wanted[1];  // it gets λ g, whatever the branch was
            if (is_passed_by) wanted[1] = false;
            const Tensor plan = has_residual && !residual ? without_skip(saved[PLAN]) : saved[PLAN];
            Tensor record;
            found = run_backward(plan, parameters, x, residual, seeds, saved[KEPT], required, g, call[0].toInt(), wanted,
                                 unscale, unscale ? &record : nullptr);
            if (is_passed_by) found[1] = scaled(g, saved[PLAN]);
            if (unscale) asked("fusedres::note", {record.unsqueeze(0), watch});
        }
        std::rotate(found.begin() + 1, found.begin() + 2, found.end());  // as forward's arguments stand, the residual last
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
    // told which network this is. A layer by itself has one operator for both.
    static std::vector<Tensor> by_operator(const Tensor &g, const Tensor &x, at::TensorList parameters,
                                           const std::optional<Tensor> &residual, const std::optional<Tensor> &seeds,
                                           const Tensor &plan, c10::ArrayRef<bool> wanted, int64_t handle,
                                           bool sees_numbers, int64_t watch) {
        c10::List<bool> wishes(wanted);
        const c10::List<Tensor> own(parameters);
        const auto [codes, numbers] = encoded(plan);
        const char *name = "fusedres::layer_backward";
        std::vector<c10::IValue> stack;
        if (handle == ONE_LAYER) {
            stack = {g, x, residual, own, seeds, codes, numbers, wishes};
        } else {
            name = sees_numbers ? "fusedres::differentiable_backward" : "fusedres::residual_network_backward";
            wishes.erase(wishes.begin() + 1);  // it takes no residual
            stack = {g, x, own, seeds, codes, numbers, watch, wishes};
            if (sees_numbers) stack.emplace_back(handle);
        }
        c10::Dispatcher::singleton().findSchemaOrThrow(name, "").callBoxed(stack);
        const c10::List<Tensor> some = stack.at(0).toTensorList();
        std::vector<Tensor> found(wanted.size());
        for (size_t i = 0, next = 0; i < wanted.size(); i++)
            if (wanted[i]) found[i] = some.get(next++);
        return found;
    }

    static const int64_t *words(const Tensor &plan) { return plan.const_data_ptr<int64_t>(); }

    static bool takes_residual(const Tensor &plan) { return Skip(words(plan)[SKIP]) == Skip::residual; }

    // Whether backward needs its numbers: for a learned λ, or for the slope of an activation of the sum.
    static bool reads_residual(const Tensor &plan) {
        const bool activates_sum = words(plan)[IS_POST] && Activation(words(plan)[ACTIVATION]) != Activation::none;
        return activates_sum || words(plan)[SLOTS + LEARNED_SKIP_SCALE] >= 0;
    }

    static Tensor without_skip(const Tensor &plan) {
        Tensor alone = fresh(plan.sizes(), at::kLong);
        std::copy_n(words(plan), plan.numel(), alone.mutable_data_ptr<int64_t>());
        alone.mutable_data_ptr<int64_t>()[SKIP] = int64_t(Skip::none);
        return alone;
    }

    static Tensor scaled(const Tensor &g, const Tensor &plan) {
        const double scale = as_double(words(plan)[SKIP_SCALE]);
        return scale == 1 ? g : at::mul(g, scale);
    }
};

}  // namespace
}  // namespace fusedres
