// One layer on a panel of rows: what is done between the products.
#pragma once

#include <memory>
#include <vector>

#include "activations.h"
#include "memory.h"
#include "network.h"
#include "parallel.h"
#include "philox.h"
#include "product.h"

namespace fusedres {

constexpr int64_t COLUMNS = 64;  // of a product's result at a time: its epilogue finds them in the nearest cache

// Rows of the call: `count` of them from `first` on, in memory for `padded` of which the last are zero.
struct Rows {
    int64_t first, count, padded;
    int64_t in_batch = first;  // the first one's index in the batch
};

inline bool is_kept(const Layer &layer, int64_t row) {
    return !layer.drop_threshold || philox(layer.seed, uint64_t(row)) >= layer.drop_threshold;
}

// ------------------------------------------------------------------------------------------------ what backward reads

// Where a layer's arrays lie in the kept memory, in elements per row before them; -1 where there is none.
struct Slots {
    int64_t input = -1, slope = -1, branch = -1, skip = -1;
};

template <class T>
class KeptLayout {
  public:
    explicit KeptLayout(const Call &call) : slots_(size_t(call.depth)) {
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            Slots &slots = slots_[size_t(l)];
            if (l > 0) slots.input = take(layer.K);
            if (layer.activation != Activation::none) slots.slope = take(layer.N);
            if (layer.keeps_branch) slots.branch = take(layer.N);
            if (layer.keeps_skip && layer.skip == Skip::projection) slots.skip = take(layer.N);
        }
    }
    const Slots &operator[](int64_t l) const { return slots_[size_t(l)]; }
    int64_t row_elements() const { return total_; }

  private:
    int64_t take(int64_t columns) {
        int64_t at = total_;
        total_ += even<T>(columns);
        return at;
    }
    std::vector<Slots> slots_;
    int64_t total_ = 0;
};

// ------------------------------------------------------------------------------------------------ a layer made ready

template <class T>
using Finish = void (*)(int64_t rows, int64_t n, const Compute<T> *z, int64_t ldz, const Compute<T> *bias,
                        const Compute<T> *scale, Compute<T> lambda, const T *s, int64_t lds, T *y, int64_t ldy, T *slope,
                        int64_t ldslope);

// y = λ s + a φ(z + b), or φ(λ s + a (z + b)), and the slope of φ where it is kept.
template <class T, Activation A, bool IS_POST, bool KEEPS>
void finish(int64_t rows, int64_t n, const Compute<T> *z, int64_t ldz, const Compute<T> *__restrict bias,
            const Compute<T> *__restrict scale, Compute<T> lambda, const T *s, int64_t lds, T *y, int64_t ldy, T *slope,
            int64_t ldslope) {
    using C = Compute<T>;
    for (int64_t r = 0; r < rows; r++) {
        const C *__restrict zr = z + r * ldz;
        const T *__restrict sr = s + r * lds;
        T *__restrict yr = y + r * ldy;
        T *__restrict slope_r = KEEPS ? slope + r * ldslope : nullptr;
        for (int64_t i = 0; i < n; i++) {
            C inside = zr[i] + bias[i];
            if constexpr (IS_POST) inside = lambda * wide(sr[i]) + scale[i] * inside;
            C value;
            if constexpr (KEEPS) {
                Activated<C> both = activated<A, C>(inside);
                value = both.value;
                slope_r[i] = narrow<T>(both.slope);
            } else {
                value = activate<A, C>(inside);
            }
            if constexpr (!IS_POST) value = lambda * wide(sr[i]) + scale[i] * value;
            yr[i] = narrow<T>(value);
        }
    }
}

template <class T, Activation A>
Finish<T> finish_of(bool is_post, bool keeps) {
    if constexpr (A == Activation::none) return finish<T, A, false, false>;
    if (is_post) return keeps ? finish<T, A, true, true> : finish<T, A, true, false>;
    return keeps ? finish<T, A, false, true> : finish<T, A, false, false>;
}

template <class T>
Finish<T> finish_of(Activation activation, bool is_post, bool keeps) {
    switch (activation) {
        case Activation::gelu: return finish_of<T, Activation::gelu>(is_post, keeps);
        case Activation::gelu_tanh: return finish_of<T, Activation::gelu_tanh>(is_post, keeps);
        case Activation::relu: return finish_of<T, Activation::relu>(is_post, keeps);
        case Activation::silu: return finish_of<T, Activation::silu>(is_post, keeps);
        case Activation::tanh: return finish_of<T, Activation::tanh>(is_post, keeps);
        case Activation::sin: return finish_of<T, Activation::sin>(is_post, keeps);
        case Activation::none: break;
    }
    return finish_of<T, Activation::none>(is_post, keeps);
}

// A layer's vectors in C, its functions, and its matrices as the products want them.
template <class T>
struct Ready {
    using C = Compute<T>;
    const Layer *layer;
    C *bias, *projection_bias;  // [N], zero where there is none
    C *scale, *unit;            // [N]: what the branch of a kept row is multiplied by, with a and without
    C *zero;                    // [N] of zeros, in C or in T
    T *weight, *projection;     // [K, N] in blocks of COLUMNS: for x Wᵀ and x Pᵀ
    T *weight_back, *projection_back;  // [N, K] in blocks of COLUMNS, or as they lie: for dz W and ds P

    const T *no_skip() const { return reinterpret_cast<const T *>(zero); }
};

// bias, scales and zeros of a layer, in the vectors that `ready` points to.
template <class T>
void fill_vectors(const Ready<T> &ready) {
    using C = Compute<T>;
    const Layer &layer = *ready.layer;
    auto *bias = static_cast<const T *>(layer.bias), *projection_bias = static_cast<const T *>(layer.projection_bias);
    auto *channel = static_cast<const T *>(layer.channel_scale);
    C unit = layer.drop_threshold ? C(layer.keep_scale) : C(1);
    for (int64_t n = 0; n < layer.N; n++) {
        ready.bias[n] = bias ? wide(bias[n]) : C(0);
        ready.projection_bias[n] = projection_bias ? wide(projection_bias[n]) : C(0);
        ready.scale[n] = (channel ? wide(channel[n]) : C(layer.branch_scale)) * unit;
        ready.unit[n] = unit;
        ready.zero[n] = C(0);
    }
}

// Blocks of COLUMNS columns of a [depth, columns] matrix, each dense and of even depth.
template <class T>
int64_t block_offset(int64_t depth, int64_t column) {
    return column * even<T>(depth);
}

inline int64_t column_blocks(int64_t columns) { return (columns + COLUMNS - 1) / COLUMNS; }

// Layers ready for one call, in memory of their own. `reserve` lays it out, `pack` fills it piece by piece.
template <class T>
class ReadyLayers {
    using C = Compute<T>;

  public:
    // for layers [first, last) of the call
    ReadyLayers(const Call &call, int64_t first, int64_t last, bool is_backward) : is_backward_(is_backward) {
        int64_t vectors = 0, matrices = 0;
        for (int64_t l = first; l < last; l++) {
            const Layer &layer = call.layers[l];
            int64_t copies = layer.skip == Skip::projection ? 2 : 1;
            vectors += 5 * layer.N;
            if (is_backward)
                matrices += copies * packs_back(layer) * even<T>(layer.N) * layer.K;
            else
                matrices += copies * layer.N * even<T>(layer.K);
        }
        vectors_ = Buffer<C>(vectors);
        matrices_ = Buffer<T>(matrices);
        C *vector = vectors_.get();
        T *matrix = matrices_.get();
        for (int64_t l = first; l < last; l++) {
            const Layer &layer = call.layers[l];
            Ready<T> ready{};
            ready.layer = &layer;
            for (C **place : {&ready.bias, &ready.projection_bias, &ready.scale, &ready.unit, &ready.zero}) {
                *place = vector;
                vector += layer.N;
            }
            bool has_projection = layer.skip == Skip::projection;
            auto place = [&](const void *given, int64_t size) {
                if (is_backward && !packs_back(layer)) return static_cast<T *>(const_cast<void *>(given));
                T *at = matrix;
                matrix += size;
                return at;
            };
            int64_t size = is_backward ? even<T>(layer.N) * layer.K : layer.N * even<T>(layer.K);
            (is_backward ? ready.weight_back : ready.weight) = place(layer.weight, size);
            if (has_projection) (is_backward ? ready.projection_back : ready.projection) = place(layer.projection, size);
            layers_.push_back(ready);
            pieces_ += 1 + column_blocks(is_backward ? layer.K : layer.N);
        }
    }

    const Ready<T> &operator[](int64_t i) const { return layers_[size_t(i)]; }

    // This member's share of the packing. Nobody may read before the team has waited.
    void pack(const Team &team) const {
        Team::Share share = team.share(pieces_);
        int64_t piece = 0;
        for (const Ready<T> &ready : layers_) {
            int64_t blocks = column_blocks(is_backward_ ? ready.layer->K : ready.layer->N);
            if (piece + blocks >= share.first && piece < share.last) {
                if (piece >= share.first) fill_vectors(ready);
                for (int64_t b = 0; b < blocks; b++)
                    if (piece + 1 + b >= share.first && piece + 1 + b < share.last) pack_block(ready, b * COLUMNS);
            }
            piece += 1 + blocks;
        }
    }

    // Whether dz W reads a packed W: pairs must be, and long rows lie a page apart, where they push each other out of the
    // nearest cache.
    static bool packs_back(const Layer &layer) { return IN_PAIRS<T> || layer.K > 2 * COLUMNS; }

  private:
    void pack_block(const Ready<T> &ready, int64_t column) const {
        const Layer &layer = *ready.layer;
        auto one = [&](const void *from, T *to) {
            auto *matrix = static_cast<const T *>(from);
            int64_t depth = is_backward_ ? layer.N : layer.K, columns = is_backward_ ? layer.K : layer.N;
            int64_t width = std::min(COLUMNS, columns - column);
            to += block_offset<T>(depth, column);
            if (!is_backward_)
                pack_transposed<T>(matrix + column * layer.K, layer.K, width, layer.K, to);
            else if (packs_back(layer))
                fusedres::pack<T>(matrix + column, layer.K, layer.N, layer.N, width, to);
        };
        one(layer.weight, is_backward_ ? ready.weight_back : ready.weight);
        if (layer.skip == Skip::projection)
            one(layer.projection, is_backward_ ? ready.projection_back : ready.projection);
    }

    bool is_backward_;
    int64_t pieces_ = 0;
    Buffer<C> vectors_;
    Buffer<T> matrices_;
    std::vector<Ready<T>> layers_;
};

// ------------------------------------------------------------------------------------------------ forward

template <class T>
struct ForwardPanel {
    const T *h;  // [rows.padded, K]
    int64_t ldh;
    const T *residual;
    int64_t ldr;
    T *y;
    int64_t ldy;
    T *slope, *branch, *skip;  // rows even(N) apart, null where not kept; a projected skip needs memory in any case
};

// s = x Pᵀ + c in columns [n, n + width), from their products z.
template <class T>
void write_projected_skip(const Ready<T> &ready, int64_t rows, const ForwardPanel<T> &panel, int64_t begin, int64_t end,
                          const Compute<T> *z, int64_t ldz) {
    const int64_t ld = even<T>(ready.layer->N);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t n = begin; n < end; n++)
            panel.skip[r * ld + n] = narrow<T>(z[r * ldz + n - begin] + ready.projection_bias[n]);
}

// y, and what is kept, in columns [n, n + width), from their products z.
template <class T>
void finish_panel(const Ready<T> &ready, const Rows &rows, const ForwardPanel<T> &panel, int64_t n, int64_t width,
                  const Compute<T> *z, int64_t ldz) {
    using C = Compute<T>;
    const Layer &layer = *ready.layer;
    const int64_t ld = even<T>(layer.N);
    const C lambda = C(layer.skip == Skip::none ? 0 : layer.skip_scale);
    const T *s = ready.no_skip();
    int64_t lds = 0;
    if (layer.skip == Skip::identity) s = panel.h + n, lds = panel.ldh;
    if (layer.skip == Skip::residual) s = panel.residual + n, lds = panel.ldr;
    if (layer.skip == Skip::projection) s = panel.skip + n, lds = ld;

    auto write = [&](int64_t r, int64_t count, bool kept) {
        const C *from = kept ? z + r * ldz : ready.zero;
        const int64_t ldfrom = kept ? ldz : 0;
        const C *bias = kept ? ready.bias + n : ready.zero, *scale = kept ? ready.scale + n : ready.zero;
        finish_of<T>(layer.activation, layer.is_post, panel.slope)(
            count, width, from, ldfrom, bias, scale, lambda, s + r * lds, lds, panel.y + r * panel.ldy + n, panel.ldy,
            panel.slope ? panel.slope + r * ld + n : nullptr, ld);
        if (panel.branch)
            finish_of<T>(layer.activates_sum() ? Activation::none : layer.activation, false, false)(
                count, width, from, ldfrom, bias, kept ? ready.unit : ready.zero, C(0), ready.no_skip(), 0,
                panel.branch + r * ld + n, ld, nullptr, 0);
    };
    if (!layer.drop_threshold) return write(0, rows.count, true);
    for (int64_t r = 0; r < rows.count; r++) write(r, 1, is_kept(layer, rows.in_batch + r));
}

// Columns [begin, end) of one layer's y from rows h; z is scratch of rows.padded * COLUMNS.
template <class T>
void forward_panel(bool has_brgemm, const Ready<T> &ready, const Rows &rows, const ForwardPanel<T> &panel, int64_t begin,
                   int64_t end, Compute<T> *z) {
    const Layer &layer = *ready.layer;
    for (int64_t n = begin; n < end; n += COLUMNS) {
        const int64_t width = std::min(COLUMNS, end - n);
        auto multiply = [&](const T *packed) {
            product<T>(has_brgemm, rows.padded, width, even<T>(layer.K), panel.h, panel.ldh,
                       packed + block_offset<T>(layer.K, n), width, z, width, false);
        };
        if (layer.skip == Skip::projection) {
            multiply(ready.projection);
            write_projected_skip(ready, rows.count, panel, n, n + width, z, width);
        }
        multiply(ready.weight);
        finish_panel(ready, rows, panel, n, width, z, width);
    }
}

// The padding of a panel of T: rows past the last, and the column that makes a depth even.
template <class T>
void zero_padding(T *panel, const Rows &rows, int64_t columns) {
    const int64_t ld = even<T>(columns);
    if (ld > columns)
        for (int64_t r = 0; r < rows.count; r++) panel[r * ld + columns] = T{};
    std::fill(panel + rows.count * ld, panel + rows.padded * ld, T{});
}

// Rows of a matrix, copied to where padding fits.
template <class T>
void copy_rows(const T *from, int64_t ld, const Rows &rows, int64_t columns, T *to) {
    for (int64_t r = 0; r < rows.count; r++) std::copy(from + r * ld, from + r * ld + columns, to + r * even<T>(columns));
    zero_padding(to, rows, columns);
}

// ------------------------------------------------------------------------------------------------ backward

// A thread's sums over rows for one layer, in double: added up over panels.
struct Sums {
    double *dbias, *dprojection_bias, *dchannel;  // [N], null where not wanted
    double dskip_scale = 0, dbranch_scale = 0;

    void add(const Layer &layer, const Sums &other) {
        for (auto part : {&Sums::dbias, &Sums::dprojection_bias, &Sums::dchannel})
            for (int64_t n = 0; this->*part && n < layer.N; n++) (this->*part)[n] += (other.*part)[n];
        dskip_scale += other.dskip_scale, dbranch_scale += other.dbranch_scale;
    }
};

template <class T>
struct BackwardPanel {
    Compute<T> *g;  // [rows, N] dense: ∂L/∂y, overwritten by the gradient at the sum
    const T *slope, *branch;
    const T *s;  // the skip, rows lds apart
    int64_t lds, ld;  // ld: of slope, branch, dz and ds
    T *dz, *ds;       // ds: of a projection or a residual, null else
    int64_t ldds;
    Compute<T> *dh;  // [rows, K] dense: λ g is written here for an identity skip, null where no dx is wanted
};

// dz = a g φ', ds = λ g, and the sums over rows. `line` is scratch of 2 N.
template <class T>
void backward_panel(const Ready<T> &ready, const Rows &rows, const BackwardPanel<T> &panel, Sums &sums,
                    Compute<T> *__restrict line) {
    using C = Compute<T>;
    const Layer &layer = *ready.layer;
    const int64_t N = layer.N;
    const C lambda = C(layer.skip_scale);
    const bool is_identity = layer.skip == Skip::identity, has_slope = panel.slope != nullptr;
    C *__restrict dbias = line, *__restrict spare = line + N;
    std::fill(dbias, dbias + N, C(0));
    for (int64_t r = 0; r < rows.count; r++) {
        C *__restrict g = panel.g + r * N;
        const T *__restrict slope = has_slope ? panel.slope + r * panel.ld : nullptr;
        const C *__restrict scale = ready.scale;
        T *__restrict dz = panel.dz + r * panel.ld;
        C *__restrict dh = is_identity && panel.dh ? panel.dh + r * N : spare;
        if (layer.activates_sum())
            for (int64_t n = 0; n < N; n++) g[n] *= wide(slope[n]);
        if (!is_kept(layer, rows.in_batch + r)) {
            for (int64_t n = 0; n < N; n++) dz[n] = T{}, dh[n] = lambda * g[n];
        } else if (has_slope && !layer.is_post) {
            for (int64_t n = 0; n < N; n++) {
                C gradient = scale[n] * g[n] * wide(slope[n]);
                dz[n] = narrow<T>(gradient);
                dbias[n] += gradient;
                dh[n] = lambda * g[n];
            }
        } else {
            for (int64_t n = 0; n < N; n++) {
                C gradient = scale[n] * g[n];
                dz[n] = narrow<T>(gradient);
                dbias[n] += gradient;
                dh[n] = lambda * g[n];
            }
        }
    }
    if (sums.dbias)
        for (int64_t n = 0; n < N; n++) sums.dbias[n] += dbias[n];

    if (panel.ds) {
        std::fill(dbias, dbias + N, C(0));
        for (int64_t r = 0; r < rows.count; r++) {
            const C *__restrict g = panel.g + r * N;
            T *__restrict ds = panel.ds + r * panel.ldds;
            for (int64_t n = 0; n < N; n++) {
                ds[n] = narrow<T>(lambda * g[n]);
                dbias[n] += lambda * g[n];
            }
        }
        if (sums.dprojection_bias)
            for (int64_t n = 0; n < N; n++) sums.dprojection_bias[n] += dbias[n];
    }
    if (layer.dskip_scale || layer.dbranch_scale) {
        std::fill(dbias, dbias + N, C(0));
        std::fill(spare, spare + N, C(0));
        for (int64_t r = 0; r < rows.count; r++) {
            const C *__restrict g = panel.g + r * N;
            if (layer.dskip_scale) {
                const T *__restrict s = panel.s + r * panel.lds;
                for (int64_t n = 0; n < N; n++) dbias[n] += g[n] * wide(s[n]);
            }
            if (layer.dbranch_scale) {
                const T *__restrict branch = panel.branch + r * panel.ld;
                for (int64_t n = 0; n < N; n++) spare[n] += g[n] * wide(branch[n]);
            }
        }
        for (int64_t n = 0; n < N; n++) {
            sums.dskip_scale += dbias[n];
            sums.dbranch_scale += spare[n];
            if (sums.dchannel) sums.dchannel[n] += spare[n];
        }
    }
}

// The sums of one layer as its gradients, where wanted.
template <class T>
void write_sums(const Layer &layer, const Sums &sums) {
    auto write = [](void *to, const double *from, int64_t count) {
        for (int64_t n = 0; to && n < count; n++) static_cast<T *>(to)[n] = narrow<T>(Compute<T>(from[n]));
    };
    write(layer.dbias, sums.dbias, layer.N);
    write(layer.dprojection_bias, sums.dprojection_bias, layer.N);
    write(layer.dskip_scale, &sums.dskip_scale, 1);
    if (layer.channel_scale)
        write(layer.dbranch_scale, sums.dchannel, layer.N);
    else
        write(layer.dbranch_scale, &sums.dbranch_scale, 1);
}

}  // namespace fusedres
