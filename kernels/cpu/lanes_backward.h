// Backward through layers of narrow widths: lanes are rows, and gradients of parameters are sums over lanes.
#pragma once

#include "lanes.h"

namespace fusedres {

// A thread's gradients: of vectors and small matrices lane by lane, vectors of W partial sums, which `settle` adds to totals in
// double; of larger matrices as they are, rows `row_of` apart, the first thread's in place where that fits.
template <class T>
class LaneGradients {
    using C = Compute<T>;

  public:
    LaneGradients(const Call &call, bool is_first) : layers_(size_t(call.depth)) {
        int64_t vectors = 0, numbers = 0;
        auto take = [&](int64_t &at, bool wanted, int64_t count) {
            at = wanted ? vectors : -1;
            vectors += wanted ? count : 0;
        };
        auto take_matrix = [&](int64_t &at, C *&matrix, const Layer &layer, void *wanted) {
            take(at, wanted && !is_matrix(layer), layer.N * layer.K);
            if (!wanted || !is_matrix(layer)) return;
            if (is_first && std::is_same_v<T, C> && row_of(layer) == layer.K)
                matrix = static_cast<C *>(wanted);
            else
                numbers += layer.N * row_of(layer);
        };
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            At &at = layers_[size_t(l)];
            take_matrix(at.dweight, at.weight, layer, layer.dweight), take(at.dbias, layer.dbias, layer.N);
            take_matrix(at.dprojection, at.projection, layer, layer.dprojection);
            take(at.dprojection_bias, layer.dprojection_bias, layer.N);
            take(at.dbranch, layer.dbranch_scale, layer.N), take(at.dskip, layer.dskip_scale, 1);
        }
        vectors_ = rounded_up(vectors, LANES<C>);
        lanes_ = Buffer<C>(vectors_ * LANES<C>), totals_ = Buffer<double>(vectors_), matrices_ = Buffer<C>(numbers);
        std::fill(lanes_.get(), lanes_.get() + vectors_ * LANES<C>, C(0));
        std::fill(totals_.get(), totals_.get() + vectors_, 0.0);
        C *next = matrices_.get();
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            At &at = layers_[size_t(l)];
            auto place = [&](C *&matrix, void *wanted) {
                if (wanted && is_matrix(layer) && !matrix) matrix = std::exchange(next, next + layer.N * row_of(layer));
            };
            place(at.weight, layer.dweight), place(at.projection, layer.dprojection);
        }
    }

    static bool is_matrix(const Layer &layer) { return layer.N * layer.K >= 256; }  // fewer sums are quicker lane by lane
    static int64_t row_of(const Layer &layer) { return rounded_up(layer.K, LANES<C>); }

    struct At {
        int64_t dweight, dbias, dprojection, dprojection_bias, dbranch, dskip;
        C *weight = nullptr, *projection = nullptr;
    };
    const At &operator[](int64_t l) const { return layers_[size_t(l)]; }
    C *at(int64_t vector) const { return lanes_.get() + vector * LANES<C>; }
    void settle() {
        constexpr int W = LANES<C>;
        for (int64_t v = 0; v < vectors_; v += W) {
            Vector<C> some[W];
            for (int i = 0; i < W; i++) some[i] = load(at(v + i)), store(at(v + i), Vector<C>{});
            const Vector<C> sums = sums_of<C>(some);
            for (int i = 0; i < W; i++) totals_[v + i] += double(sums[i]);
        }
    }
    double total(int64_t vector) const { return totals_[vector]; }

    bool is_empty = true;  // the matrices hold nothing yet

  private:
    std::vector<At> layers_;
    int64_t vectors_ = 0;
    Buffer<C> lanes_, matrices_;
    Buffer<double> totals_;
};

constexpr int64_t SETTLE_EVERY = 64;  // blocks: a lane adds up few enough terms to keep its digits

// sums[i] += Σ_r a[r] b[i][r], lane by lane
template <class C, class Lanes>
inline void lane_dots(Lanes R, int64_t count, const C *a, const C *b, C *sums) {
    constexpr int W = LANES<C>;
    for (int64_t i = 0; i < count; i++) {
        Vector<C> sum = load(sums + i * W);
        for (int64_t r = 0; r < R; r += W) sum += load(a + r) * load(b + i * R + r);
        store(sums + i * W, sum);
    }
}

template <class C, class Lanes>
inline void lane_sums(Lanes R, int64_t count, const C *a, C *sums) {
    constexpr int W = LANES<C>;
    for (int64_t i = 0; i < count; i++) {
        Vector<C> sum = load(sums + i * W);
        for (int64_t r = 0; r < R; r += W) sum += load(a + i * R + r);
        store(sums + i * W, sum);
    }
}

// dW (+)= dz hᵀ over a block's rows, dz [N][R] and h [K][R]: lane by lane, or as a matrix from h turned to [R][K].
template <class C>
void lanes_weight_gradient(int64_t R, const Layer &layer, const C *dz, const C *h, C *lanes, C *matrix, const C *turned,
                           bool add) {
    const int64_t N = layer.N, K = layer.K, row = rounded_up(K, LANES<C>);
    if (matrix) own_product<C>(N, row, R, dz, R, 1, turned, row, matrix, row, add);
    if (lanes)
        for (int64_t n = 0; n < N; n++) lane_dots<C>(R, K, dz + n * R, h, lanes + n * K * LANES<C>);
}

// From g [N][R] of the last layer down to dx [K][R], which is returned; `g` and `dh` are scratch in turn.
template <class T, class Lanes, class C = Compute<T>>
C *backward_lanes_block(const Call &call, Lanes R, const LaneLayer<C> *parameters, const KeptLayout<C> &layout,
                        int64_t first_row, const LaneMemory<C> &memory, const C *kept, LaneGradients<T> &sums, C *g, C *dh,
                        C *dz, C *turned, C *dresidual, bool wants_dx, Record<C> *record, int64_t count) {
    constexpr int W = LANES<C>;
    for (int64_t l = call.depth - 1; l >= 0; l--) {
        const Layer &layer = call.layers[l];
        const LaneLayer<C> &given = parameters[l];
        const auto &at = sums[l];
        const int64_t N = layer.N, K = layer.K;
        auto slot = [&](int64_t offset) { return offset >= 0 ? kept + offset * R : nullptr; };
        auto lanes = [&](int64_t vector) { return vector >= 0 ? sums.at(vector) : nullptr; };
        const C *h = l ? slot(layout[l].input) : memory.x, *slope = slot(layout[l].slope);
        if (l > 0) {
            const int64_t count = call.layers[l - 1].N * R;
            if (layout[l - 1].slope >= 0) prefetch(slot(layout[l - 1].slope), count);
            if (l > 1) prefetch(slot(layout[l - 1].input), call.layers[l - 1].K * R);
        }
        const C lambda = C(layer.skip_scale), unit = layer.drop_threshold ? C(layer.keep_scale) : C(1);

        if (layer.activates_sum())
            for (int64_t i = 0; i < N * R; i++) g[i] *= slope[i];
        const bool wants_dh = l > 0 || wants_dx, is_identity = layer.skip == Skip::identity;
        const bool has_slope = slope && !layer.is_post, drops = layer.drop_threshold != 0;
        alignas(64) C stays[MOST_LANES];
        if (drops)
            for (int64_t r = 0; r < R; r++) stays[r] = is_kept(layer, first_row + r);
        for (int64_t n = 0; n < N; n++) {
            const C scale = (given.channel ? given.channel[n] : C(layer.branch_scale)) * unit;
            Vector<C> total = {}, row[MOST_LANES / W];
            for (int64_t r = 0; r < R; r += W) {
                const int64_t i = n * R + r;
                const Vector<C> gradient = load(g + i);
                Vector<C> lane = scale * gradient;
                if (has_slope) lane *= load(slope + i);
                if (drops) lane = load(stays + r) != 0 ? lane : Vector<C>{};
                if (is_identity && wants_dh) store(dh + i, lambda * gradient);
                store(dz + i, lane);
                total += lane;
                row[r / W] = lane;
            }
            if (C *to = lanes(at.dbias >= 0 ? at.dbias + n : -1)) store(to, load(to) + total);
            for (int64_t k = 0; at.dweight >= 0 && k < K; k++) {
                C *to = sums.at(at.dweight + n * K + k);
                Vector<C> sum = load(to);
                for (int64_t r = 0; r < R; r += W) sum += row[r / W] * load(h + k * R + r);
                store(to, sum);
            }
        }
        if (at.weight || at.projection) transpose<C>(h, R, K, R, turned, rounded_up(K, W));
        lanes_weight_gradient<C>(R, layer, dz, h, nullptr, at.weight, turned, !sums.is_empty);  // small ones are done
        if (at.dbranch >= 0)
            for (int64_t n = 0; n < N; n++)
                lane_dots<C>(R, 1, g + n * R, slot(layout[l].branch) + n * R, sums.at(at.dbranch + n));
        if (at.dskip >= 0) {
            const C *s = layer.skip == Skip::projection ? slot(layout[l].skip)
                         : layer.skip == Skip::residual ? memory.skip
                                                        : h;
            Vector<C> total = {};  // of this block, before it meets the sum of all
            for (int64_t i = 0; i < N * R; i += W) total += load(g + i) * load(s + i);
            store(sums.at(at.dskip), load(sums.at(at.dskip)) + total);
        }

        Half<C> half{};
        if (is_identity) half = {g, R, true, lambda};
        if (wants_dh && !layer.is_dropped)
            lanes_product<C>(R, K, N, given.weight, 1, K, nullptr, dz, dh, is_identity);
        else if (wants_dh && !is_identity)
            std::fill(dh, dh + K * R, C(0));
        if (layer.skip == Skip::projection || layer.skip == Skip::residual)
            for (int64_t i = 0; i < N * R; i++) g[i] *= lambda;  // ds
        if (layer.skip == Skip::residual && dresidual) std::copy(g, g + N * R, dresidual);
        if (layer.skip == Skip::projection) {
            lanes_weight_gradient<C>(R, layer, g, h, lanes(at.dprojection), at.projection, turned, !sums.is_empty);
            if (at.dprojection_bias >= 0) lane_sums<C>(R, N, g, sums.at(at.dprojection_bias));
            if (record && wants_dh) half = record->hold(dh, R, K, count);
            if (wants_dh) lanes_product<C>(R, K, N, given.projection, 1, K, nullptr, g, dh, true);
        }
        if (record && wants_dh) record->add(l, dh, R, K, count, half);
        std::swap(g, dh);
    }
    sums.is_empty = false;
    return g;
}

// to[i] = Σ over members of their total of lanes `first` + i
template <class T, class From>
void add_up_lanes(const Team &team, int64_t count, void *to, const From &from, int64_t first) {
    if (!to || first < 0) return;
    for (int64_t i = 0; i < count; i++) {
        double total = 0;
        for (int t = 0; t < team.members; t++) total += from[size_t(t)]->total(first + i);
        static_cast<T *>(to)[i] = narrow<T>(Compute<T>(total));
    }
}

// to [N, K] = Σ over members of their matrices
template <class T, class From, class Pick>
void add_up_matrices(const Team &team, const Layer &layer, void *to, const From &from, const Pick &pick) {
    if (!to || !pick(*from[0])) return;
    const int64_t row = LaneGradients<T>::row_of(layer);
    Compute<T> *total = pick(*from[0]);
    for (int t = 1; t < team.members; t++) {
        const Compute<T> *more = pick(*from[size_t(t)]);
        for (int64_t i = 0; i < layer.N * row; i++) total[i] += more[i];
    }
    if (total == to) return;
    for (int64_t n = 0; n < layer.N; n++)
        for (int64_t k = 0; k < layer.K; k++) static_cast<T *>(to)[n * layer.K + k] = narrow<T>(total[n * row + k]);
}

template <class T>
void backward_lanes(const Call &call, const T *g, int64_t ldg, const Compute<T> *kept, T *dx, T *dresidual) {
    using C = Compute<T>;
    const int64_t R = lane_rows<C>(call), blocks = (call.M + R - 1) / R;
    const int64_t N = call.layers[call.depth - 1].N, K = call.layers[0].K;
    LaneParameters<T> numbers(call);
    const auto parameters = lane_layers<T>(call, numbers);
    const KeptLayout<C> layout(call);
    const int members = int(std::min<int64_t>(call.threads, blocks));
    std::vector<std::unique_ptr<LaneGradients<T>>> gradients{size_t(members)};
    const Records<C> records = records_of<C>(call, members);
    together(members, [&](const Team &team) {
        auto &slot = gradients[size_t(team.member)];
        LaneGradients<T> &mine = *(slot = std::make_unique<LaneGradients<T>>(call, team.member == 0));
        LaneMemory<C> memory(call, R, 4);
        C *turns[] = {memory.take(), memory.take(), memory.take(), memory.take()};
        Buffer<C> recomputed(kept ? 0 : R * layout.row_elements()), turned(R * rounded_up(widest(call), LANES<C>));
        std::fill(turned.get(), turned.get() + R * rounded_up(widest(call), LANES<C>), C(0));
        Team::Share share = team.share(blocks);
        for (int64_t b = share.first; b < share.last; b++) {
            const Rows rows{b * R, std::min(R, call.M - b * R), R};
            const int64_t first_row = call.first_row + rows.first;
            load_block<T>(call, rows, memory);
            const C *block = kept ? kept + b * R * layout.row_elements() : recomputed.get();
            if (!kept)
                with_lanes<C>(R, [&](auto R) {
                    return forward_lanes_block<C>(call, R, parameters.data(), &layout, first_row, memory, recomputed.get());
                });
            to_lanes<T>(R, g + rows.first * ldg, ldg, rows.count, N, turns[0]);
            const C *found = with_lanes<C>(R, [&](auto R) {
                return backward_lanes_block<T>(call, R, parameters.data(), layout, first_row, memory, block, mine, turns[0],
                                               turns[1], turns[2], turned.get(), dresidual ? turns[3] : nullptr, dx != nullptr,
                                               records[size_t(team.member)].get(), rows.count);
            });
            if (dx) from_lanes<T>(R, found, rows.count, K, dx + rows.first * K);
            if (dresidual) from_lanes<T>(R, turns[3], rows.count, N, dresidual + rows.first * N);
            if ((b - share.first) % SETTLE_EVERY == SETTLE_EVERY - 1) mine.settle();
        }
        mine.settle();
        team.wait();
        Team::Share mine_to_add = team.share(call.depth);
        for (int64_t l = mine_to_add.first; l < mine_to_add.last; l++) {
            const Layer &layer = call.layers[l];
            const auto &at = mine[l];
            const int64_t size = layer.N * layer.K;
            using Mine = LaneGradients<T>;
            add_up_lanes<T>(team, size, layer.dweight, gradients, at.dweight);
            add_up_lanes<T>(team, size, layer.dprojection, gradients, at.dprojection);
            add_up_matrices<T>(team, layer, layer.dweight, gradients, [=](const Mine &of) { return of[l].weight; });
            add_up_matrices<T>(team, layer, layer.dprojection, gradients, [=](const Mine &of) { return of[l].projection; });
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
    write_records(call, records);
}

}  // namespace fusedres
