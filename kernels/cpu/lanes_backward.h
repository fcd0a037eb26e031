// Backward through layers of width below 16: lanes are rows, and gradients of parameters are sums over lanes.
#pragma once

#include "lanes.h"

namespace fusedres {

// A thread's gradients lane by lane, vectors of W partial sums; `settle` adds them to totals in double.
template <class C>
class LaneGradients {
  public:
    explicit LaneGradients(const Call &call) : layers_(size_t(call.depth)) {
        int64_t vectors = 0;
        auto take = [&](int64_t &at, bool wanted, int64_t count) {
            at = wanted ? vectors : -1;
            vectors += wanted ? count : 0;
        };
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            At &at = layers_[size_t(l)];
            take(at.dweight, layer.dweight, layer.N * layer.K), take(at.dbias, layer.dbias, layer.N);
            take(at.dprojection, layer.dprojection, layer.N * layer.K);
            take(at.dprojection_bias, layer.dprojection_bias, layer.N);
            take(at.dbranch, layer.dbranch_scale, layer.N), take(at.dskip, layer.dskip_scale, 1);
        }
        vectors_ = vectors;
        lanes_ = Buffer<C>(vectors * LANES<C>), totals_ = Buffer<double>(vectors);
        std::fill(lanes_.get(), lanes_.get() + vectors * LANES<C>, C(0));
        std::fill(totals_.get(), totals_.get() + vectors, 0.0);
    }

    struct At {
        int64_t dweight, dbias, dprojection, dprojection_bias, dbranch, dskip;
    };
    const At &operator[](int64_t l) const { return layers_[size_t(l)]; }
    C *at(int64_t vector) const { return lanes_.get() + vector * LANES<C>; }
    void settle() {
        for (int64_t v = 0; v < vectors_; v++) {
            double total = 0;
            for (int i = 0; i < LANES<C>; i++) total += at(v)[i], at(v)[i] = 0;
            totals_[v] += total;
        }
    }
    double total(int64_t vector) const { return totals_[vector]; }

  private:
    std::vector<At> layers_;
    int64_t vectors_ = 0;
    Buffer<C> lanes_;
    Buffer<double> totals_;
};

constexpr int64_t SETTLE_EVERY = 64;  // blocks: a lane adds up few enough terms to keep its digits

// sums[i] += Σ_r a[r] b[i][r], lane by lane
template <class C, int R>
inline void lane_dots(int64_t count, const C *a, const C *b, C *sums) {
    constexpr int W = LANES<C>;
    Vector<C> lanes[R / W];
    for (int j = 0; j < R / W; j++) lanes[j] = load(a + j * W);
    for (int64_t i = 0; i < count; i++) {
        Vector<C> sum = load(sums + i * W);
        for (int j = 0; j < R / W; j++) sum += lanes[j] * load(b + i * R + j * W);
        store(sums + i * W, sum);
    }
}

template <class C, int R>
inline void lane_sums(int64_t count, const C *a, C *sums) {
    constexpr int W = LANES<C>;
    for (int64_t i = 0; i < count; i++) {
        Vector<C> sum = load(sums + i * W);
        for (int j = 0; j < R / W; j++) sum += load(a + i * R + j * W);
        store(sums + i * W, sum);
    }
}

// From g [N][R] of the last layer down to dx [K][R], which is returned; `g` and `dh` are scratch in turn.
template <class C, int R>
C *backward_lanes_block(const Call &call, const LaneLayer<C> *parameters, const KeptLayout<C> &layout, int64_t first_row,
                        const LaneMemory<C, R> &memory, const C *kept, LaneGradients<C> &sums, C *g, C *dh, C *dz,
                        C *dresidual, bool wants_dx) {
    constexpr int W = LANES<C>;
    for (int64_t l = call.depth - 1; l >= 0; l--) {
        const Layer &layer = call.layers[l];
        const LaneLayer<C> &given = parameters[l];
        const auto &at = sums[l];
        const int64_t N = layer.N, K = layer.K;
        auto slot = [&](int64_t offset) { return offset >= 0 ? kept + offset * R : nullptr; };
        const C *h = l ? slot(layout[l].input) : memory.x, *slope = slot(layout[l].slope);
        const C lambda = C(layer.skip_scale), unit = layer.drop_threshold ? C(layer.keep_scale) : C(1);

        if (layer.activates_sum())
            for (int64_t i = 0; i < N * R; i++) g[i] *= slope[i];
        const bool wants_dh = l > 0 || wants_dx, is_identity = layer.skip == Skip::identity;
        const bool has_slope = slope && !layer.is_post, drops = layer.drop_threshold != 0;
        alignas(64) C stays[R];
        if (drops)
            for (int r = 0; r < R; r++) stays[r] = is_kept(layer, first_row + r);
        for (int64_t n = 0; n < N; n++) {
            const C scale = (given.channel ? given.channel[n] : C(layer.branch_scale)) * unit;
            Vector<C> lanes[R / W], total = {};
            for (int v = 0; v < R / W; v++) {
                const int64_t i = n * R + v * W;
                const Vector<C> gradient = load(g + i);
                lanes[v] = scale * gradient;
                if (has_slope) lanes[v] *= load(slope + i);
                if (drops) lanes[v] = load(stays + v * W) != 0 ? lanes[v] : Vector<C>{};
                if (is_identity && wants_dh) store(dh + i, lambda * gradient);
                store(dz + i, lanes[v]);
                total += lanes[v];
            }
            if (at.dbias >= 0) store(sums.at(at.dbias + n), load(sums.at(at.dbias + n)) + total);
            for (int64_t k = 0; at.dweight >= 0 && k < K; k++) {
                C *to = sums.at(at.dweight + n * K + k);
                Vector<C> sum = load(to);
                for (int v = 0; v < R / W; v++) sum += lanes[v] * load(h + k * R + v * W);
                store(to, sum);
            }
        }
        if (at.dbranch >= 0)
            for (int64_t n = 0; n < N; n++)
                lane_dots<C, R>(1, g + n * R, slot(layout[l].branch) + n * R, sums.at(at.dbranch + n));
        if (at.dskip >= 0) {
            const C *s = layer.skip == Skip::projection ? slot(layout[l].skip)
                         : layer.skip == Skip::residual ? memory.skip
                                                        : h;
            for (int64_t n = 0; n < N; n++) lane_dots<C, R>(1, g + n * R, s + n * R, sums.at(at.dskip));
        }

        if (wants_dh) lanes_product<C, R>(K, N, given.weight, 1, K, nullptr, dz, dh, is_identity);
        if (layer.skip == Skip::projection || layer.skip == Skip::residual)
            for (int64_t i = 0; i < N * R; i++) g[i] *= lambda;  // ds
        if (layer.skip == Skip::residual && dresidual) std::copy(g, g + N * R, dresidual);
        if (layer.skip == Skip::projection) {
            if (at.dprojection >= 0)
                for (int64_t n = 0; n < N; n++) lane_dots<C, R>(K, g + n * R, h, sums.at(at.dprojection + n * K));
            if (at.dprojection_bias >= 0) lane_sums<C, R>(N, g, sums.at(at.dprojection_bias));
            if (wants_dh) lanes_product<C, R>(K, N, given.projection, 1, K, nullptr, g, dh, true);
        }
        std::swap(g, dh);
    }
    return g;
}

// to[i] = Σ over members and lanes
template <class T, class From>
void add_up_lanes(const Team &team, int64_t count, void *to, const From &from, int64_t first) {
    if (!to) return;
    for (int64_t i = 0; i < count; i++) {
        double total = 0;
        for (int t = 0; t < team.members; t++) total += from[size_t(t)]->total(first + i);
        static_cast<T *>(to)[i] = narrow<T>(Compute<T>(total));
    }
}

template <class T, int R>
void backward_lanes(const Call &call, const T *g, int64_t ldg, const Compute<T> *kept, T *dx, T *dresidual) {
    using C = Compute<T>;
    const int64_t blocks = (call.M + R - 1) / R, N = call.layers[call.depth - 1].N, K = call.layers[0].K;
    LaneParameters<T> numbers(call);
    const auto parameters = lane_layers<T>(call, numbers);
    const KeptLayout<C> layout(call);
    const int members = int(std::min<int64_t>(call.threads, blocks));
    std::vector<std::unique_ptr<LaneGradients<C>>> gradients{size_t(members)};
    together(members, [&](const Team &team) {
        LaneGradients<C> &mine = *(gradients[size_t(team.member)] = std::make_unique<LaneGradients<C>>(call));
        LaneMemory<C, R> memory;
        alignas(64) C turns[4][LaneMemory<C, R>::SIZE];
        Buffer<C> recomputed(kept ? 0 : R * layout.row_elements());
        Team::Share share = team.share(blocks);
        for (int64_t b = share.first; b < share.last; b++) {
            const Rows rows{b * R, std::min<int64_t>(R, call.M - b * R), R};
            const int64_t first_row = call.first_row + rows.first;
            load_block<T, R>(call, rows, memory);
            const C *block = kept ? kept + b * R * layout.row_elements() : recomputed.get();
            if (!kept) forward_lanes_block<C, R>(call, parameters.data(), &layout, first_row, memory, recomputed.get());
            to_lanes<T, R>(g + rows.first * ldg, ldg, rows.count, N, turns[0]);
            const C *found =
                backward_lanes_block<C, R>(call, parameters.data(), layout, first_row, memory, block, mine, turns[0],
                                           turns[1], turns[2], dresidual ? turns[3] : nullptr, dx != nullptr);
            if (dx) from_lanes<T, R>(found, rows.count, K, dx + rows.first * K);
            if (dresidual) from_lanes<T, R>(turns[3], rows.count, N, dresidual + rows.first * N);
            if ((b - share.first) % SETTLE_EVERY == SETTLE_EVERY - 1) mine.settle();
        }
        mine.settle();
        team.wait();
        Team::Share mine_to_add = team.share(call.depth);
        for (int64_t l = mine_to_add.first; l < mine_to_add.last; l++) {
            const Layer &layer = call.layers[l];
            const auto &at = mine[l];
            const int64_t size = layer.N * layer.K;
            add_up_lanes<T>(team, size, layer.dweight, gradients, at.dweight);
            add_up_lanes<T>(team, size, layer.dprojection, gradients, at.dprojection);
            add_up_lanes<T>(team, layer.N, layer.dbias, gradients, at.dbias);
            add_up_lanes<T>(team, layer.N, layer.dprojection_bias, gradients, at.dprojection_bias);
            add_up_lanes<T>(team, 1, layer.dskip_scale, gradients, at.dskip);
            if (layer.dbranch_scale && layer.channel_scale) {
                add_up_lanes<T>(team, layer.N, layer.dbranch_scale, gradients, at.dbranch);
            } else if (layer.dbranch_scale) {
                double total = 0;
                for (int t = 0; t < team.members; t++)
                    for (int64_t n = 0; n < layer.N; n++) total += gradients[size_t(t)]->total(at.dbranch + n);
                *static_cast<T *>(layer.dbranch_scale) = narrow<T>(C(total));
            }
        }
    });
}

}  // namespace fusedres