// What a network is to the kernels: plain numbers and addresses, without torch.
//
//     z = x Wᵀ + b        order "pre":  y = λ s + a drop(φ(z))        order "post":  y = φ(λ s + a drop(z))
//
// x [M, K]   W [N, K]   b [N]   s, y, z [M, N]: s is x, a residual, or x Pᵀ + c with P [N, K] and c [N].
// A layer's y is the next layer's x. Matrices are row-major; T is float, double or bfloat16, and products, sums and
// activations are computed in C: float for bfloat16, else T.
#pragma once

#include <cstdint>
#include <vector>

namespace fusedres {

enum class Activation : int64_t { gelu, gelu_tanh, relu, silu, tanh, sin, none };
enum class Skip : int64_t { none, identity, residual, projection };

// How the work is cut (`fusedres/dispatch.py` chooses).
enum class Way : int64_t {
    lanes,   // widths up to about 128: SIMD lanes are rows, blocks of rows go through all layers
    dots,    // few rows: dot products with the rows of W as they lie
    blocks,  // the same with rows as they lie: a few layers of whole vectors, and bfloat16
    layers,  // wider: layer by layer, the epilogue on each panel while it is in cache
};

// Addresses are of contiguous T, null where there is none; numbers are read from learned scales beforehand.
struct Layer {
    int64_t N, K;
    int64_t place;  // in the network, whose layers are not all in every call
    Activation activation;
    bool is_post;
    Skip skip;
    double skip_scale;         // λ
    double branch_scale;       // a, where it is one number
    uint64_t drop_threshold;   // a row whose Philox word is below it loses its branch; 0: none does
    bool is_dropped;           // every row loses its branch: neither z nor what it gives is computed
    double keep_scale;         // what the branch of a kept row is multiplied by, 1 / (1 - drop_path)
    uint64_t seed;
    const void *weight, *bias, *projection, *projection_bias;
    const void *channel_scale;  // a [N], where it is one number per output feature
    // Gradients to write, null where not wanted: da is [N] with a channel_scale, else one number.
    void *dweight, *dbias, *dprojection, *dprojection_bias, *dskip_scale, *dbranch_scale;
    // What backward will read of this layer besides its input and its slope.
    bool keeps_branch;  // drop(φ(z)), or drop(z) with is_post: where a has a gradient
    bool keeps_skip;    // a projected s: where λ has a gradient

    bool activates_sum() const { return is_post && activation != Activation::none; }
};

struct Call {
    int64_t M;
    int64_t first_row;  // of these rows in the batch: stochastic depth counts from its first
    const Layer *layers;
    int64_t depth;
    Way way;
    int threads;
    bool has_brgemm;  // torch's brgemm may be called, now and for this T
    const void *x;    // [M, K], rows ldx apart
    int64_t ldx;
    const void *residual;  // [M, N], rows ldr apart; of a network of one layer
    int64_t ldr;
    double *record;  // of backward: a row (record.h) for each layer of the network, zeroed; null where nothing is recorded
    double unscale;  // what gradients are multiplied by before they are recorded
};

// y [M, N] dense. kept: `kept_bytes` of memory for backward to read, or null.
template <class T>
void forward(const Call &call, void *y, void *kept);

// Products of a derivative of φ (`derivatives.h`): p, or where v is given, dz and dfactors, each where not null.
struct Products {
    Activation activation;
    int order;  // how often φ is differentiated, and how many factors there are
    int64_t count;
    int threads;
    const float *z, *factors[2], *v;  // [count]
    float *p, *dz, *dfactors[2];
};

void multiply(const Products &call);

// Writes dx [M, K] and dresidual [M, N] dense, where not null, and the layers' gradients. g [M, N], rows ldg apart.
// kept is what forward left there, or null: then backward computes it again, block by block.
template <class T>
void backward(const Call &call, const void *g, int64_t ldg, const void *kept, void *dx, void *dresidual);

template <class T>
int64_t kept_bytes(const Call &call);

// Numbers of a gradient, and the half of each that came through a branch, if there is one.
struct Recorded {
    const void *total, *branch;
    int64_t count;
};

// Adds to rows [all, recorded::COLUMNS] what there is to record (record.h) of numbers of T.
template <class T>
void record_numbers(const std::vector<Recorded> &all, double unscale, int threads, double *rows);

}  // namespace fusedres
