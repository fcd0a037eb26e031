// Few rows: every number is a dot product of a row of h and a row of W, which is read once, as it lies.
#pragma once

#include "blocks.h"
#include "wide.h"

namespace fusedres {

constexpr int64_t MOST_DOT_ROWS = 4;

// z [ROWS][ldz]: columns [n, n + W / ROWS) of h Wᵀ. h [ROWS][ldh] in C, its rows followed by zeros up to a vector.
template <class T, int ROWS>
inline void some_dots(int64_t K, int64_t columns, const T *weight, const Compute<T> *h, int64_t ldh, Compute<T> *z,
                      int64_t ldz) {
    using C = Compute<T>;
    constexpr int W = LANES<C>, COUNT = W / ROWS;
    Vector<C> sums[W] = {};
    const T *of[COUNT];
    for (int j = 0; j < COUNT; j++) of[j] = weight + std::min<int64_t>(j, columns - 1) * K;
    int64_t k = 0;
    if (ROWS == 1 && K >= 128)
        for (int j0 = 0; j0 + 4 <= COUNT; j0 += 4) {
            Vector<C> parts[4][4] = {};
            for (k = 0; k + 4 * W <= K; k += 4 * W)
#pragma GCC unroll 4
                for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
                    for (int i = 0; i < 4; i++) parts[j][i] += load_wide(of[j0 + j] + k + i * W) * load(h + k + i * W);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) sums[j0 + j] = (parts[j][0] + parts[j][1]) + (parts[j][2] + parts[j][3]);
        }
    for (; k + W <= K; k += W)
#pragma GCC unroll 16
        for (int j = 0; j < COUNT; j++) {
            Vector<C> w = load_wide(of[j] + k);
#pragma GCC unroll 4
            for (int m = 0; m < ROWS; m++) sums[m * COUNT + j] += w * load(h + m * ldh + k);
        }
    if (k < K)
        for (int j = 0; j < COUNT; j++) {
            Vector<C> w = load_some(of[j] + k, K - k);
            for (int m = 0; m < ROWS; m++) sums[m * COUNT + j] += w * load(h + m * ldh + k);
        }
    Vector<C> total = sums_of<C>(sums);
    for (int m = 0; m < ROWS; m++)
        for (int64_t j = 0; j < columns; j++) z[m * ldz + j] = total[m * COUNT + j];
}

// Columns [begin, end) of z = h Wᵀ, z [M][N].
template <class T, int ROWS>
void dots_of(int64_t K, const T *weight, const Compute<T> *h, int64_t ldh, Compute<T> *z, int64_t N, int64_t begin,
             int64_t end) {
    constexpr int COUNT = LANES<Compute<T>> / ROWS;
    for (int64_t n = begin; n < end; n += COUNT)
        some_dots<T, ROWS>(K, std::min<int64_t>(COUNT, end - n), weight + n * K, h, ldh, z + n, N);
}

template <class T>
void dots(int64_t M, int64_t K, const T *weight, const Compute<T> *h, int64_t ldh, Compute<T> *z, int64_t N,
          int64_t begin, int64_t end) {
    if constexpr (LANES<Compute<T>> >= 4)
        for (; M >= 4; M -= 4, h += 4 * ldh, z += 4 * N) dots_of<T, 4>(K, weight, h, ldh, z, N, begin, end);
    if constexpr (LANES<Compute<T>> >= 2)
        for (; M >= 2; M -= 2, h += 2 * ldh, z += 2 * N) dots_of<T, 2>(K, weight, h, ldh, z, N, begin, end);
    if (M) dots_of<T, 1>(K, weight, h, ldh, z, N, begin, end);
}

// dh [M][K] += dz W for columns [begin, end) of K; dz [M][lddz]. A few rows of W at a time meet all rows of dz. What
// they add up to is added to dh, which holds the skip's gradient: term by term each would be rounded as that large number is.
template <class T>
void rows_of_weight(int64_t M, int64_t N, int64_t K, const Compute<T> *dz, int64_t lddz, const T *weight, Compute<T> *dh,
                    int64_t begin, int64_t end) {
    using C = Compute<T>;
    constexpr int64_t ROWS = 64, WIDTH = 256, MOST = 2 * MOST_DOT_ROWS;
    C parts[MOST][WIDTH], totals[MOST][WIDTH];  // the sums of ROWS rows of W, and of all
    for (int64_t k0 = begin; k0 < end; k0 += WIDTH)
        for (int64_t m0 = 0; m0 < M; m0 += MOST) {
            const int64_t width = std::min(WIDTH, end - k0), rows = std::min(MOST, M - m0);
            for (int64_t m = 0; m < rows; m++) std::fill(totals[m], totals[m] + width, C(0));
            for (int64_t n0 = 0; n0 < N; n0 += ROWS) {
                const int64_t last = std::min(n0 + ROWS, N);
                for (int64_t m = 0; m < rows; m++) std::fill(parts[m], parts[m] + width, C(0));
                int64_t n = n0;
                for (; n + 4 <= last; n += 4) {
                    const T *__restrict w = weight + n * K + k0;
                    for (int64_t m = 0; m < rows; m++) {
                        C *__restrict to = parts[m];
                        const C *d = dz + (m0 + m) * lddz + n, d0 = d[0], d1 = d[1], d2 = d[2], d3 = d[3];
                        for (int64_t k = 0; k < width; k++)
                            to[k] += d0 * wide(w[k]) + d1 * wide(w[k + K]) + d2 * wide(w[k + 2 * K]) + d3 * wide(w[k + 3 * K]);
                    }
                }
                for (; n < last; n++)
                    for (int64_t m = 0; m < rows; m++)
                        for (int64_t k = 0; k < width; k++)
                            parts[m][k] += dz[(m0 + m) * lddz + n] * wide(weight[n * K + k0 + k]);
                for (int64_t m = 0; m < rows; m++)
                    for (int64_t k = 0; k < width; k++) totals[m][k] += parts[m][k];
            }
            for (int64_t m = 0; m < rows; m++)
                for (int64_t k = 0; k < width; k++) dh[(m0 + m) * K + k0 + k] += totals[m][k];
        }
}

// Rows [begin, end) of dW [N, K] = dzᵀ h
template <class T>
void outer_products(int64_t M, int64_t K, const Compute<T> *dz, int64_t lddz, const Compute<T> *h, int64_t ldh, T *dweight,
                    int64_t begin, int64_t end, Compute<T> *__restrict line) {
    for (int64_t n = begin; n < end; n++) {
        T *__restrict to = dweight + n * K;
        if (M == 1) {
            for (int64_t k = 0; k < K; k++) to[k] = narrow<T>(dz[n] * h[k]);
            continue;
        }
        for (int64_t k = 0; k < K; k++) line[k] = dz[n] * h[k];
        for (int64_t m = 1; m < M; m++)
            for (int64_t k = 0; k < K; k++) line[k] += dz[m * lddz + n] * h[m * ldh + k];
        for (int64_t k = 0; k < K; k++) to[k] = narrow<T>(line[k]);
    }
}

// The vectors of one layer, as the epilogue wants them: where they lie already, or in this thread's memory until the next.
template <class T>
class LayerVectors {
    using C = Compute<T>;
    enum Place { ZERO, ONE, BIAS, PROJECTION_BIAS, SCALE, UNIT, PLACES };

  public:
    explicit LayerVectors(int64_t widest) : widest_(widest), memory_(PLACES * widest) {
        std::fill(at(ZERO), at(ZERO) + widest, C(0));
        std::fill(at(ONE), at(ONE) + widest, C(1));
    }
    Ready<T> of(const Layer &layer) const {
        const C unit = layer.drop_threshold ? C(layer.keep_scale) : C(1);
        Ready<T> ready{};
        ready.layer = &layer;
        ready.zero = at(ZERO);
        ready.bias = wide_vector(layer.bias, layer.N, BIAS);
        ready.projection_bias = wide_vector(layer.projection_bias, layer.N, PROJECTION_BIAS);
        ready.unit = constant(unit, layer.N, UNIT);
        ready.scale = layer.channel_scale ? scaled(layer, unit) : constant(C(layer.branch_scale) * unit, layer.N, SCALE);
        return ready;
    }

  private:
    C *at(Place place) const { return memory_.get() + place * widest_; }
    C *wide_vector(const void *given, int64_t N, Place place) const {
        auto *from = static_cast<const T *>(given);
        if (!from) return at(ZERO);
        if constexpr (std::is_same_v<T, C>) {
            return const_cast<C *>(from);  // nobody writes there
        } else {
            for (int64_t n = 0; n < N; n++) at(place)[n] = wide(from[n]);
            return at(place);
        }
    }
    C *constant(C value, int64_t N, Place place) const {
        if (value == C(1)) return at(ONE);
        std::fill(at(place), at(place) + N, value);
        return at(place);
    }
    C *scaled(const Layer &layer, C unit) const {
        auto *channel = static_cast<const T *>(layer.channel_scale);
        for (int64_t n = 0; n < layer.N; n++) at(SCALE)[n] = wide(channel[n]) * unit;
        return at(SCALE);
    }

    int64_t widest_;
    Buffer<C> memory_;
};

// Rows in C, whole vectors of them: where they lie, or widened into memory and followed by zeros.
template <class C>
struct WideRows {
    const C *rows;
    int64_t ld;
};
template <class T>
WideRows<Compute<T>> wide_rows(const T *from, int64_t ld, int64_t M, int64_t columns, Compute<T> *memory, int64_t ldm) {
    if constexpr (std::is_same_v<T, Compute<T>>)
        if (columns % LANES<T> == 0) return {from, ld};
    widen_rows(from, ld, M, columns, memory, ldm);
    return {memory, ldm};
}

struct DotsShape {
    int64_t width, ld;  // the widest layer; a row of activations with room for a vector's zeros
    int members;
};

template <class T>
DotsShape dots_shape(const Call &call) {
    int64_t largest = 0;
    for (int64_t l = 0; l < call.depth; l++) largest = std::max(largest, call.layers[l].N * call.layers[l].K);
    const int64_t width = rounded_up(widest(call), 16);
    return {width, width + LANES<Compute<T>>, largest * call.M >= (int64_t(1) << 16) ? call.threads : 1};
}

template <class T>
void forward_dots(const Call &call, T *y, T *kept) {
    using C = Compute<T>;
    const auto [width, ld, members] = dots_shape<T>(call);
    const int64_t M = call.M;
    const KeptLayout<T> layout(call);
    Buffer<T> turns(3 * M * width);
    together(members, [&](const Team &team) {
        const LayerVectors<T> vectors(width);
        Buffer<C> scratch(M * (ld + width));
        C *h_wide = scratch.get(), *z = h_wide + M * ld;
        const T *h = static_cast<const T *>(call.x);
        int64_t ldh = call.ldx;
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            const Ready<T> ready = vectors.of(layer);
            const int64_t N = layer.N, K = layer.K, ldn = even<T>(N);
            const auto [begin, end] = team.share(N);
            auto slot = [&](int64_t offset) { return kept && offset >= 0 ? kept + offset * M : nullptr; };
            const auto [given, ldgiven] = wide_rows(h, ldh, M, K, h_wide, ld);

            ForwardPanel<T> panel{};
            panel.h = h, panel.ldh = ldh;
            panel.residual = static_cast<const T *>(call.residual), panel.ldr = call.ldr;
            const bool is_last = l + 1 == call.depth;
            panel.y = is_last ? y : kept ? slot(layout[l + 1].input) : turns.get() + l % 2 * M * width;
            panel.ldy = is_last ? N : ldn;
            panel.slope = slot(layout[l].slope), panel.branch = slot(layout[l].branch);
            panel.skip = layout[l].skip >= 0 && kept ? slot(layout[l].skip) : turns.get() + 2 * M * width;
            if (layer.skip == Skip::projection) {
                dots<T>(M, K, static_cast<const T *>(layer.projection), given, ldgiven, z, N, begin, end);
                write_projected_skip(ready, M, panel, begin, end, z + begin, N);
            }
            if (layer.is_dropped)
                std::fill(z, z + M * N, C(0));
            else
                dots<T>(M, K, static_cast<const T *>(layer.weight), given, ldgiven, z, N, begin, end);
            finish_panel(ready, Rows{0, M, M, call.first_row}, panel, begin, end - begin, z + begin, N);
            h = panel.y, ldh = panel.ldy;
            team.wait();
        }
    });
}

template <class T>
void backward_dots(const Call &call, const T *g, int64_t ldg, const T *kept, T *dx, T *dresidual) {
    using C = Compute<T>;
    const auto [width, ld, members] = dots_shape<T>(call);
    const int64_t M = call.M;
    const KeptLayout<T> layout(call);
    Buffer<T> recomputed(kept ? 0 : M * (layout.row_elements() + width));
    if (!kept) {
        forward_dots<T>(call, recomputed.get() + M * layout.row_elements(), recomputed.get());
        kept = recomputed.get();
    }
    Buffer<C> gradients(2 * M * width);
    const Records<C> records = records_of<C>(call, members);
    together(members, [&](const Team &team) {
        const LayerVectors<T> vectors(width);
        Buffer<C> scratch(M * ld + 4 * M * width + 2 * width);
        Buffer<T> narrow_scratch(2 * M * width);
        Buffer<double> totals(3 * width);
        C *h_wide = scratch.get(), *mine = h_wide + M * ld, *dh = mine + M * width, *dz = dh + M * width;
        C *ds = dz + M * width, *line = ds + M * width;
        for (int64_t l = call.depth - 1; l >= 0; l--) {
            const Layer &layer = call.layers[l];
            const Ready<T> ready = vectors.of(layer);
            const int64_t N = layer.N, K = layer.K, ldn = even<T>(N);
            auto slot = [&](int64_t offset) { return offset >= 0 ? kept + offset * M : nullptr; };
            const T *h = l ? slot(layout[l].input) : static_cast<const T *>(call.x);
            const int64_t ldh = l ? even<T>(K) : call.ldx;
            const Rows rows{0, M, M, call.first_row};
            const bool wants_dh = l > 0 || dx;

            // every member computes dz for itself: it is little, and nobody waits
            C *shared = gradients.get() + l % 2 * M * width, *next = gradients.get() + (l + 1) % 2 * M * width;
            if (l + 1 == call.depth)
                widen_rows(g, ldg, M, N, mine, N);
            else
                std::copy(shared, shared + M * N, mine);
            BackwardPanel<T> panel{};
            panel.g = mine, panel.dh = wants_dh ? dh : nullptr;
            panel.slope = slot(layout[l].slope), panel.branch = slot(layout[l].branch), panel.ld = ldn;
            panel.s = h, panel.lds = ldh;
            panel.dz = narrow_scratch.get(), panel.ldds = ldn;
            if (layer.skip == Skip::projection)
                panel.s = slot(layout[l].skip), panel.lds = ldn, panel.ds = narrow_scratch.get() + M * width;
            if (layer.skip == Skip::residual) {
                panel.s = static_cast<const T *>(call.residual), panel.lds = call.ldr;
                if (dresidual && team.member == 0) panel.ds = dresidual, panel.ldds = N;
            }
            Sums sums{totals.get(), totals.get() + width, totals.get() + 2 * width};
            std::fill(totals.get(), totals.get() + 3 * width, 0.0);
            backward_panel<T>(ready, rows, panel, sums, line);
            if (team.member == 0) write_sums<T>(layer, sums);

            widen_rows(panel.dz, ldn, M, N, dz, N);
            if (layer.skip == Skip::projection) widen_rows(panel.ds, ldn, M, N, ds, N);
            const auto [given, ldgiven] = wide_rows(h, ldh, M, K, h_wide, ld);
            const auto rows_share = team.share(N), columns_share = team.share(K);
            if (layer.dweight)
                outer_products<T>(M, K, dz, N, given, ldgiven, static_cast<T *>(layer.dweight), rows_share.first,
                                  rows_share.last, line);
            if (layer.dprojection)
                outer_products<T>(M, K, ds, N, given, ldgiven, static_cast<T *>(layer.dprojection), rows_share.first,
                                  rows_share.last, line);
            if (wants_dh) {
                const auto [begin, end] = columns_share;
                Record<C> *record = records[size_t(team.member)].get();
                for (int64_t m = 0; m < M; m++)
                    for (int64_t k = begin; k < end; k++)
                        next[m * K + k] = layer.skip == Skip::identity ? dh[m * K + k] : C(0);
                Half<C> half{};
                if (layer.skip == Skip::identity) half = {mine + begin, K, true, C(layer.skip_scale)};
                if (!layer.is_dropped)
                    rows_of_weight<T>(M, N, K, dz, N, static_cast<const T *>(layer.weight), next, begin, end);
                if (layer.skip == Skip::projection) {
                    if (record) half = record->hold(next + begin, K, M, end - begin);
                    rows_of_weight<T>(M, N, K, ds, N, static_cast<const T *>(layer.projection), next, begin, end);
                }
                if (record) record->add(l, next + begin, K, M, end - begin, half);
                if (l == 0)
                    for (int64_t m = 0; m < M; m++)
                        for (int64_t k = begin; k < end; k++) dx[m * K + k] = narrow<T>(next[m * K + k]);
            }
            team.wait();
        }
    });
    write_records(call, records);
}

}  // namespace fusedres
