// Widths below 16: SIMD lanes are rows. A block of rows lies feature by feature, h [K][R], and goes through all layers; a weight
// is one number that meets R rows at a time.
#pragma once

#include "blocks.h"

namespace fusedres {

constexpr int64_t WIDEST_LANES = 15;

// to [N][R] = add + Σ_k w(n, k) h[k]; w(n, k) lies at n * row + k * depth.
template <class C, int ROWS, int R>
void lanes_product_rows(int64_t K, const C *w, int64_t row, int64_t depth, const C *bias, const C *h, C *to, bool add) {
    constexpr int W = LANES<C>;
    for (int r = 0; r < R; r += W) {
        Vector<C> sums[ROWS];
        for (int n = 0; n < ROWS; n++) sums[n] = add ? load(to + n * R + r) : Vector<C>{} + (bias ? bias[n] : C(0));
        for (int64_t k = 0; k < K; k++) {
            Vector<C> lane = load(h + k * R + r);
            for (int n = 0; n < ROWS; n++) sums[n] += w[n * row + k * depth] * lane;
        }
        for (int n = 0; n < ROWS; n++) store(to + n * R + r, sums[n]);
    }
}

template <class C, int R>
void lanes_product(int64_t N, int64_t K, const C *w, int64_t row, int64_t depth, const C *bias, const C *h, C *to,
                   bool add) {
    int64_t n = 0;
    auto some = [&](auto rows) {
        lanes_product_rows<C, rows, R>(K, w + n * row, row, depth, bias ? bias + n : nullptr, h, to + n * R, add);
        n += rows;
    };
    while (N - n >= 4) some(std::integral_constant<int, 4>());
    if (N - n == 3) some(std::integral_constant<int, 3>());
    if (N - n == 2) some(std::integral_constant<int, 2>());
    if (N - n == 1) some(std::integral_constant<int, 1>());
}

// Parameters as the lanes read them, in C: as they lie, or converted.
template <class T>
class LaneParameters {
    using C = Compute<T>;

  public:
    explicit LaneParameters(const Call &call) {
        if constexpr (!std::is_same_v<T, C>) {
            int64_t count = 0;
            for (int64_t l = 0; l < call.depth; l++)
                count += 2 * call.layers[l].N * call.layers[l].K + 3 * call.layers[l].N;
            numbers_ = Buffer<C>(count);
            next_ = numbers_.get();
        }
    }
    const C *read(const void *from, int64_t count) {
        if constexpr (std::is_same_v<T, C>) {
            return static_cast<const C *>(from);
        } else {
            if (!from) return nullptr;
            C *to = std::exchange(next_, next_ + count);
            for (int64_t i = 0; i < count; i++) to[i] = wide(static_cast<const T *>(from)[i]);
            return to;
        }
    }

  private:
    Buffer<C> numbers_;
    C *next_ = nullptr;
};

template <class C>
using LanesFinish = void (*)(int64_t count, const C *z, const C *s, C lambda, C scale, C *y, C *slope);

// y = λ s + a φ(z), or φ(λ s + a z).
template <class C, Activation A, bool IS_POST, bool KEEPS>
void finish_lanes(int64_t count, const C *__restrict z, const C *__restrict s, C lambda, C scale, C *__restrict y,
                  C *__restrict slope) {
    for (int64_t i = 0; i < count; i++) {
        C inside = z[i], value;
        if constexpr (IS_POST) inside = lambda * s[i] + scale * inside;
        if constexpr (KEEPS) {
            Activated<C> both = activated<A, C>(inside);
            value = both.value;
            slope[i] = both.slope;
        } else {
            value = activate<A, C>(inside);
        }
        if constexpr (!IS_POST) value = lambda * s[i] + scale * value;
        y[i] = value;
    }
}

template <class C, Activation A>
LanesFinish<C> lanes_finish_of(bool is_post, bool keeps) {
    if constexpr (A == Activation::none) return finish_lanes<C, A, false, false>;
    if (is_post) return keeps ? finish_lanes<C, A, true, true> : finish_lanes<C, A, true, false>;
    return keeps ? finish_lanes<C, A, false, true> : finish_lanes<C, A, false, false>;
}

template <class C>
LanesFinish<C> lanes_finish_of(Activation activation, bool is_post, bool keeps) {
    switch (activation) {
        case Activation::gelu: return lanes_finish_of<C, Activation::gelu>(is_post, keeps);
        case Activation::gelu_tanh: return lanes_finish_of<C, Activation::gelu_tanh>(is_post, keeps);
        case Activation::relu: return lanes_finish_of<C, Activation::relu>(is_post, keeps);
        case Activation::silu: return lanes_finish_of<C, Activation::silu>(is_post, keeps);
        case Activation::tanh: return lanes_finish_of<C, Activation::tanh>(is_post, keeps);
        case Activation::sin: return lanes_finish_of<C, Activation::sin>(is_post, keeps);
        case Activation::none: break;
    }
    return lanes_finish_of<C, Activation::none>(is_post, keeps);
}

// A layer's parameters in C.
template <class C>
struct LaneLayer {
    const C *weight, *bias, *projection, *projection_bias, *channel;
};

template <class T>
std::vector<LaneLayer<Compute<T>>> lane_layers(const Call &call, LaneParameters<T> &parameters) {
    std::vector<LaneLayer<Compute<T>>> layers;
    layers.reserve(size_t(call.depth));
    for (int64_t l = 0; l < call.depth; l++) {
        const Layer &layer = call.layers[l];
        const int64_t size = layer.N * layer.K;
        layers.push_back({parameters.read(layer.weight, size), parameters.read(layer.bias, layer.N),
                          parameters.read(layer.projection, size), parameters.read(layer.projection_bias, layer.N),
                          parameters.read(layer.channel_scale, layer.N)});
    }
    return layers;
}

// Rows of a matrix, feature by feature; lanes past the last row are zero.
template <class T, int R>
void to_lanes(const T *from, int64_t ld, int64_t count, int64_t columns, Compute<T> *to) {
    if (count < R) std::fill(to, to + columns * R, Compute<T>(0));
    for (int64_t r = 0; r < count; r++)
        for (int64_t k = 0; k < columns; k++) to[k * R + r] = wide(from[r * ld + k]);
}

template <class T, int R>
void from_lanes(const Compute<T> *from, int64_t count, int64_t columns, T *to) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t k = 0; k < columns; k++) to[r * columns + k] = narrow<T>(from[k * R + r]);
}

// values [N][R] = 0 in the lanes of dropped rows, whatever stood there
template <class C, int R>
void drop_lanes(const Layer &layer, int64_t first_row, C *values) {
    for (int r = 0; r < R; r++)
        if (!is_kept(layer, first_row + r))
            for (int64_t n = 0; n < layer.N; n++) values[n * R + r] = 0;
}

// What one block of rows needs: arrays [width][R].
template <class C, int R>
struct LaneMemory {
    static constexpr int64_t SIZE = (WIDEST_LANES + 1) * R;
    alignas(64) C x[SIZE], h[2][SIZE], z[SIZE], skip[SIZE], none[SIZE];
};

// All layers of a block whose x is in memory.x; returns y [N][R]. kept: arrays [.][R] at the layout's slots, or null.
template <class C, int R>
C *forward_lanes_block(const Call &call, const LaneLayer<C> *parameters, const KeptLayout<C> *layout, int64_t first_row,
                       LaneMemory<C, R> &memory, C *kept) {
    const C *h = memory.x;
    C *y = nullptr;
    for (int64_t l = 0; l < call.depth; l++) {
        const Layer &layer = call.layers[l];
        const LaneLayer<C> &given = parameters[l];
        auto slot = [&](int64_t offset) { return kept && offset >= 0 ? kept + offset * R : nullptr; };
        y = kept && l + 1 < call.depth ? slot((*layout)[l + 1].input) : memory.h[l % 2];
        C *slope = kept ? slot((*layout)[l].slope) : nullptr;

        lanes_product<C, R>(layer.N, layer.K, given.weight, layer.K, 1, given.bias, h, memory.z, false);
        const C *s = memory.none;
        if (layer.skip == Skip::identity) s = h;
        if (layer.skip == Skip::residual) s = memory.skip;
        if (layer.skip == Skip::projection) {
            C *skip = kept && (*layout)[l].skip >= 0 ? slot((*layout)[l].skip) : memory.skip;
            lanes_product<C, R>(layer.N, layer.K, given.projection, layer.K, 1, given.projection_bias, h, skip, false);
            s = skip;
        }
        const bool drops = layer.drop_threshold != 0, is_post = layer.activates_sum();
        const C unit = drops ? C(layer.keep_scale) : C(1), lambda = C(layer.skip == Skip::none ? 0 : layer.skip_scale);
        if (C *branch = kept ? slot((*layout)[l].branch) : nullptr) {
            lanes_finish_of<C>(is_post ? Activation::none : layer.activation, false, false)(
                layer.N * R, memory.z, memory.none, C(0), unit, branch, nullptr);
            if (drops) drop_lanes<C, R>(layer, first_row, branch);
        }
        if (drops && is_post) drop_lanes<C, R>(layer, first_row, memory.z);
        const LanesFinish<C> finish = lanes_finish_of<C>(layer.activation, layer.is_post, slope != nullptr);
        if (!given.channel)
            finish(layer.N * R, memory.z, s, lambda, C(layer.branch_scale) * unit, y, slope);
        else
            for (int64_t n = 0; n < layer.N; n++)
                finish(R, memory.z + n * R, s + n * R, lambda, given.channel[n] * unit, y + n * R,
                       slope ? slope + n * R : nullptr);
        if (drops && !is_post) {
            for (int r = 0; r < R; r++)
                if (!is_kept(layer, first_row + r))
                    for (int64_t n = 0; n < layer.N; n++) {
                        y[n * R + r] = lambda * s[n * R + r];
                        if (slope) slope[n * R + r] = 0;
                    }
        }
        h = y;
    }
    return y;
}

template <class T, int R>
void load_block(const Call &call, const Rows &rows, LaneMemory<Compute<T>, R> &memory) {
    std::fill(std::begin(memory.none), std::end(memory.none), Compute<T>(0));
    to_lanes<T, R>(static_cast<const T *>(call.x) + rows.first * call.ldx, call.ldx, rows.count, call.layers[0].K,
                   memory.x);
    if (call.residual)
        to_lanes<T, R>(static_cast<const T *>(call.residual) + rows.first * call.ldr, call.ldr, rows.count,
                       call.layers[0].N, memory.skip);
}

template <class T, int R>
void forward_lanes(const Call &call, T *y, Compute<T> *kept) {
    using C = Compute<T>;
    const int64_t blocks = (call.M + R - 1) / R, N = call.layers[call.depth - 1].N;
    LaneParameters<T> numbers(call);
    const auto parameters = lane_layers<T>(call, numbers);
    const KeptLayout<C> layout(call);
    together(int(std::min<int64_t>(call.threads, blocks)), [&](const Team &team) {
        LaneMemory<C, R> memory;
        Team::Share share = team.share(blocks);
        for (int64_t b = share.first; b < share.last; b++) {
            const Rows rows{b * R, std::min<int64_t>(R, call.M - b * R), R};
            load_block<T, R>(call, rows, memory);
            C *block = kept ? kept + b * R * layout.row_elements() : nullptr;
            const C *out =
                forward_lanes_block<C, R>(call, parameters.data(), &layout, call.first_row + rows.first, memory, block);
            from_lanes<T, R>(out, rows.count, N, y + rows.first * N);
        }
    });
}

// ------------------------------------------------------------------------------------------------ backward

// A thread's gradients lane by lane, vectors of W partial sums, added up at the end.
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
        lanes_ = Buffer<C>(vectors * LANES<C>);
        std::fill(lanes_.get(), lanes_.get() + vectors * LANES<C>, C(0));
    }

    struct At {
        int64_t dweight, dbias, dprojection, dprojection_bias, dbranch, dskip;
    };
    const At &operator[](int64_t l) const { return layers_[size_t(l)]; }
    C *at(int64_t vector) const { return lanes_.get() + vector * LANES<C>; }
    double total(int64_t vector) const {
        double total = 0;
        for (int i = 0; i < LANES<C>; i++) total += at(vector)[i];
        return total;
    }

  private:
    std::vector<At> layers_;
    Buffer<C> lanes_;
};

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
        for (int64_t n = 0; n < N; n++) {
            const C scale = (given.channel ? given.channel[n] : C(layer.branch_scale)) * unit;
            if (slope && !layer.is_post)
                for (int r = 0; r < R; r++) dz[n * R + r] = scale * g[n * R + r] * slope[n * R + r];
            else
                for (int r = 0; r < R; r++) dz[n * R + r] = scale * g[n * R + r];
        }
        if (layer.drop_threshold) drop_lanes<C, R>(layer, first_row, dz);
        if (at.dweight >= 0)
            for (int64_t n = 0; n < N; n++) lane_dots<C, R>(K, dz + n * R, h, sums.at(at.dweight + n * K));
        if (at.dbias >= 0) lane_sums<C, R>(N, dz, sums.at(at.dbias));
        if (at.dbranch >= 0)
            for (int64_t n = 0; n < N; n++)
                lane_dots<C, R>(1, g + n * R, slot(layout[l].branch) + n * R, sums.at(at.dbranch + n));
        if (at.dskip >= 0) {
            const C *s = layer.skip == Skip::projection ? slot(layout[l].skip)
                         : layer.skip == Skip::residual ? memory.skip
                                                        : h;
            for (int64_t n = 0; n < N; n++) lane_dots<C, R>(1, g + n * R, s + n * R, sums.at(at.dskip));
        }

        const bool wants_dh = l > 0 || wants_dx, is_identity = layer.skip == Skip::identity;
        if (wants_dh) {
            if (is_identity)
                for (int64_t i = 0; i < K * R; i++) dh[i] = lambda * g[i];
            lanes_product<C, R>(K, N, given.weight, 1, K, nullptr, dz, dh, is_identity);
        }
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
    (void)W;
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
        }
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
