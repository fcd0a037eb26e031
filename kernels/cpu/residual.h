// The sum that ends a residual block, and its gradients: what they are to the loops, without torch.
//
//     y = f b + λ x        f = a, or with dropped samples 0 in those and a / (1 - p) in the others
//     db = f g    dx = λ g    da = Σ g b f / a    dλ = Σ g x
//
// All tensors lie alike in memory, dense: `stretches` one after the other, each of `length` numbers. a is one number; or one
// per stretch, a [channels] in turn; or one per column, where a stretch is rows of a [channels].
#pragma once

#include <cstdint>

namespace fusedres {

enum class Per : int64_t { all, stretch, column };  // what has an a of its own; as kernels/spec.py numbers them

// Addresses are of T, a's of C; null where there is none.
struct Residual {
    int64_t stretches, length;
    int64_t samples;  // that stretches divide into
    Per per;
    int64_t channels;
    double branch_scale, skip_scale;  // a, where it is one number, and λ
    uint64_t seed, drop_threshold;    // of samples, as a layer has them of rows
    double keep_scale;
    int threads;
    const void *scales;  // a [channels], unless it is one number
    const void *branch, *x, *g;
    void *y, *dbranch, *dx;
    double *dbranch_scale, *dskip_scale;  // [channels], [1]
};

// Writes y.
template <class T>
void residual_forward(const Residual &call);

// Writes those gradients whose address is not null.
template <class T>
void residual_backward(const Residual &call);

}  // namespace fusedres
