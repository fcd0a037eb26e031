// One layer on a panel of rows: what is done around the products, forward and backward.
#pragma once

#include <algorithm>

#include "finish.h"
#include "kept.h"
#include "philox.h"
#include "ready.h"

namespace fusedres {

// Rows of the call: `count` of them from `first` on, in memory for `padded` of which the last are zero.
struct Rows {
    int64_t first, count, padded;
    int64_t in_batch = first;  // the first one's index in the batch
};

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
        const Finish<T> finish = finish_of<T>(layer.activation, layer.is_post, panel.slope);
        const T *skip = s + r * lds;
        T *y = panel.y + r * panel.ldy + n, *slope = panel.slope ? panel.slope + r * ld + n : nullptr;
        const int64_t rest = width % LANES<C>;
        const bool few = rest >= FEW_COLUMNS && layer.activation != Activation::none;  // for one row too: the same bits
        const int64_t whole = few ? width - rest : width;
        if (whole) finish(count, whole, from, ldfrom, bias, scale, lambda, skip, lds, y, panel.ldy, slope, ld);
        if (few)
            finish_few_columns<T>(finish, count, rest, from + whole, ldfrom, bias + whole, scale + whole, lambda,
                                  skip + whole, lds, y + whole, panel.ldy, slope ? slope + whole : nullptr, ld);
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
        if (layer.is_dropped)
            std::fill(z, z + rows.padded * width, Compute<T>(0));
        else
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
