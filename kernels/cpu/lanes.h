// Narrow layers: SIMD lanes are rows. A block of R rows lies feature by feature, h [K][R], and goes through all layers; a
// weight is one number that meets R rows at a time, as it lies.
#pragma once

#include <optional>

#include "blocks.h"

namespace fusedres {

constexpr int64_t MOST_LANES = 64;

// Rows of a block: a function of M alone, since forward and backward must agree on where things are kept.
template <class C>
int64_t lane_rows(const Call &call) {
    if (LANES<C> <= 8 && call.M <= 8) return 8;
    return call.M <= 32 ? 16 : call.M <= 256 ? 32 : MOST_LANES;
}

// Rows of a block of which nothing is kept: of narrow layers more, whose loops over few vectors wait for their last.
template <class C>
int64_t passing_lane_rows(const Call &call) {
    const int64_t R = lane_rows<C>(call);
    return R == MOST_LANES && widest(call) <= 8 && call.M >= 2048 ? 4 * R : R;
}

// work(R), which the compiler knows where R is the most.
template <class C, class Work>
auto with_lanes(int64_t R, const Work &work) {
    if constexpr (sizeof(C) == 4)
        if (R == MOST_LANES) return work(std::integral_constant<int64_t, MOST_LANES>());
    return work(R);
}

// to [ROWS][R] = add + Σ_k w(n, k) h[k], VECTORS vectors of lanes at a time; w(n, k) lies at n * row + k * depth. Terms are
// summed before they meet what they are added to, which is larger.
template <class C, int ROWS, int VECTORS, class Lanes>
inline void lanes_product_rows(Lanes lanes, Lanes R, int64_t K, const C *w, int64_t row, int64_t depth, const C *bias,
                        const C *h, C *to, bool add) {
    constexpr int W = LANES<C>;
    for (int64_t r = 0; r < lanes; r += VECTORS * W) {
        Vector<C> sums[ROWS][VECTORS], lane[VECTORS];
        for (int n = 0; n < ROWS; n++)
            for (int v = 0; v < VECTORS; v++) sums[n][v] = Vector<C>{};
        for (int64_t k = 0; k < K; k++) {
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) lane[v] = load(h + k * R + r + v * W);
#pragma GCC unroll 16
            for (int n = 0; n < ROWS; n++) {
                const C weight = w[n * row + k * depth];
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) sums[n][v] += weight * lane[v];
            }
        }
        for (int n = 0; n < ROWS; n++) {
            const C first = bias ? bias[n] : C(0);
            for (int v = 0; v < VECTORS; v++) {
                C *at = to + n * R + r + v * W;
                store(at, add ? load(at) + sums[n][v] : first + sums[n][v]);
            }
        }
    }
}

template <class C, int VECTORS, class Lanes>
void lanes_product_columns(Lanes lanes, Lanes R, int64_t N, int64_t K, const C *w, int64_t row, int64_t depth,
                           const C *bias, const C *h, C *to, bool add) {
    constexpr int ROWS = (MICRO_VECTORS > 2 ? 16 : 8) / VECTORS;  // as many sums at once as registers hold
    int64_t n = 0;
    auto some = [&](auto rows) {
        lanes_product_rows<C, rows, VECTORS>(lanes, R, K, w + n * row, row, depth, bias ? bias + n : nullptr, h, to + n * R,
                                             add);
        n += rows;
    };
    while (N - n >= ROWS) some(std::integral_constant<int, ROWS>());
    while (N - n >= 4) some(std::integral_constant<int, 4>());
    if (N - n == 3) some(std::integral_constant<int, 3>());
    if (N - n == 2) some(std::integral_constant<int, 2>());
    if (N - n == 1) some(std::integral_constant<int, 1>());
}

template <class C, class Lanes>
void lanes_product(Lanes R, int64_t N, int64_t K, const C *w, int64_t row, int64_t depth, const C *bias, const C *h,
                   C *to, bool add) {
    constexpr int W = LANES<C>, MOST = MICRO_VECTORS > 2 ? 4 : 2;
    int64_t r = 0;
    auto some = [&](auto vectors) {
        const int64_t lanes = (R - r) / (vectors * W) * (vectors * W);
        if (lanes) lanes_product_columns<C, vectors, int64_t>(lanes, R, N, K, w, row, depth, bias, h + r, to + r, add);
        r += lanes;
    };
    if (N <= 4)  // fewer instructions one vector at a time
        return lanes_product_columns<C, 1>(R, R, N, K, w, row, depth, bias, h, to, add);
    some(std::integral_constant<int, MOST>());
    if (MOST > 2) some(std::integral_constant<int, 2>());
    some(std::integral_constant<int, 1>());
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

// to [columns][R] = from [R][COLUMNS]: a number of columns that the compiler knows becomes shuffles of vectors.
constexpr int TURNED = 16;  // rows at a time
template <class T, int COLUMNS>
void turn_columns(int64_t R, const T *__restrict from, Compute<T> *__restrict to) {
    for (int64_t first = 0; first < R; first += TURNED, from += TURNED * COLUMNS, to += TURNED)
        for (int k = 0; k < COLUMNS; k++)
            for (int r = 0; r < TURNED; r++) to[k * R + r] = wide(from[r * COLUMNS + k]);
}

// Rows of a matrix, feature by feature; lanes past the last row are zero.
template <class T>
void to_lanes(int64_t R, const T *from, int64_t ld, int64_t count, int64_t columns, Compute<T> *to) {
    if (count == R && R % TURNED == 0 && ld == columns) switch (columns) {
            case 1: return turn_columns<T, 1>(R, from, to);
            case 2: return turn_columns<T, 2>(R, from, to);
            case 3: return turn_columns<T, 3>(R, from, to);
            case 4: return turn_columns<T, 4>(R, from, to);
            default: break;
        }
    if (count < R) std::fill(to, to + columns * R, Compute<T>(0));
    if constexpr (std::is_same_v<T, Compute<T>>) {
        transpose<T>(from, ld, count, columns, to, R);
    } else {
        for (int64_t k = 0; k < columns; k++)
            for (int64_t r = 0; r < count; r++) to[k * R + r] = wide(from[r * ld + k]);
    }
}

template <class T>
void from_lanes(int64_t R, const Compute<T> *__restrict from, int64_t count, int64_t columns, T *__restrict to) {
    if (columns == 1) {
        for (int64_t r = 0; r < count; r++) to[r] = narrow<T>(from[r]);
        return;
    }
    if constexpr (std::is_same_v<T, Compute<T>>) {
        transpose<T>(from, R, columns, count, to, columns);
    } else {
        for (int64_t k = 0; k < columns; k++)
            for (int64_t r = 0; r < count; r++) to[r * columns + k] = narrow<T>(from[k * R + r]);
    }
}

// values [N][R] = 0 in the lanes of dropped rows, whatever stood there
template <class C>
void drop_lanes(int64_t R, const Layer &layer, int64_t first_row, C *values) {
    for (int64_t r = 0; r < R; r++)
        if (!is_kept(layer, first_row + r))
            for (int64_t n = 0; n < layer.N; n++) values[n * R + r] = 0;
}

// What one block of rows needs: arrays [width][R], none a multiple of 4 KiB after another, where loads would wait for stores.
template <class C>
class LaneMemory {
  public:
    LaneMemory(const Call &call, int64_t R, int arrays)
        : size_(widest(call) * R + 3 * LANES<C>), memory_((6 + arrays) * size_), next_(memory_.get()) {
        for (C **array : {&x, &h[0], &h[1], &z, &skip, &none}) *array = take();
        std::fill(none, none + size_, C(0));
    }
    C *take() { return std::exchange(next_, next_ + size_); }

  private:
    int64_t size_;
    Buffer<C> memory_;
    C *next_;

  public:
    C *x, *h[2], *z, *skip, *none;
};

template <class C>
inline void prefetch(const C *from, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(C))) __builtin_prefetch(from + i);
}

// All layers of a block whose x is in memory.x; returns y [N][R]. kept: arrays [.][R] at the layout's slots, or null.
template <class C, class Lanes>
C *forward_lanes_block(const Call &call, Lanes R, const LaneLayer<C> *parameters, const KeptLayout<C> *layout,
                       int64_t first_row, const LaneMemory<C> &memory, C *kept) {
    const C *h = memory.x;
    C *y = nullptr;
    for (int64_t l = 0; l < call.depth; l++) {
        const Layer &layer = call.layers[l];
        const LaneLayer<C> &given = parameters[l];
        auto slot = [&](int64_t offset) { return kept && offset >= 0 ? kept + offset * R : nullptr; };
        y = kept && l + 1 < call.depth ? slot((*layout)[l + 1].input) : memory.h[l % 2];
        C *slope = kept ? slot((*layout)[l].slope) : nullptr;

        if (layer.is_dropped)
            std::fill(memory.z, memory.z + layer.N * R, C(0));
        else
            lanes_product<C>(R, layer.N, layer.K, given.weight, layer.K, 1, given.bias, h, memory.z, false);
        const C *s = memory.none;
        if (layer.skip == Skip::identity) s = h;
        if (layer.skip == Skip::residual) s = memory.skip;
        if (layer.skip == Skip::projection) {
            C *skip = kept && (*layout)[l].skip >= 0 ? slot((*layout)[l].skip) : memory.skip;
            lanes_product<C>(R, layer.N, layer.K, given.projection, layer.K, 1, given.projection_bias, h, skip, false);
            s = skip;
        }
        const bool drops = layer.drop_threshold != 0, is_post = layer.activates_sum();
        const C unit = drops ? C(layer.keep_scale) : C(1), lambda = C(layer.skip == Skip::none ? 0 : layer.skip_scale);
        if (C *branch = kept ? slot((*layout)[l].branch) : nullptr) {
            lanes_finish_of<C>(is_post ? Activation::none : layer.activation, false, false)(
                layer.N * R, memory.z, memory.none, C(0), unit, branch, nullptr);
            if (drops) drop_lanes<C>(R, layer, first_row, branch);
        }
        if (drops && is_post) drop_lanes<C>(R, layer, first_row, memory.z);
        const LanesFinish<C> finish = lanes_finish_of<C>(layer.activation, layer.is_post, slope != nullptr);
        if (!given.channel)
            finish(layer.N * R, memory.z, s, lambda, C(layer.branch_scale) * unit, y, slope);
        else
            for (int64_t n = 0; n < layer.N; n++)
                finish(R, memory.z + n * R, s + n * R, lambda, given.channel[n] * unit, y + n * R,
                       slope ? slope + n * R : nullptr);
        if (drops && !is_post) {
            for (int64_t r = 0; r < R; r++)
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

template <class T>
void load_block(const Call &call, const Rows &rows, const LaneMemory<Compute<T>> &memory) {
    to_lanes<T>(rows.padded, static_cast<const T *>(call.x) + rows.first * call.ldx, call.ldx, rows.count,
                call.layers[0].K, memory.x);
    if (call.residual)
        to_lanes<T>(rows.padded, static_cast<const T *>(call.residual) + rows.first * call.ldr, call.ldr, rows.count,
                    call.layers[0].N, memory.skip);
}

template <class T>
void forward_lanes(const Call &call, T *y, Compute<T> *kept) {
    using C = Compute<T>;
    const int64_t R = kept ? lane_rows<C>(call) : passing_lane_rows<C>(call), blocks = (call.M + R - 1) / R;
    const int64_t N = call.layers[call.depth - 1].N;
    LaneParameters<T> numbers(call);
    const auto parameters = lane_layers<T>(call, numbers);
    const std::optional<KeptLayout<C>> layout = kept ? std::optional<KeptLayout<C>>(call) : std::nullopt;
    together(int(std::min<int64_t>(call.threads, blocks)), [&](const Team &team) {
        const LaneMemory<C> memory(call, R, 0);
        Team::Share share = team.share(blocks);
        for (int64_t b = share.first; b < share.last; b++) {
            const Rows rows{b * R, std::min(R, call.M - b * R), R};
            load_block<T>(call, rows, memory);
            C *block = kept ? kept + b * R * layout->row_elements() : nullptr;
            const C *out = with_lanes<C>(R, [&](auto R) {
                return forward_lanes_block<C>(call, R, parameters.data(), layout ? &*layout : nullptr,
                                              call.first_row + rows.first, memory, block);
            });
            from_lanes<T>(R, out, rows.count, N, y + rows.first * N);
        }
    });
}

}  // namespace fusedres
