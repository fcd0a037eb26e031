// Layers made ready for one call: vectors in C, and matrices packed as the products want them.
#pragma once

#include <vector>

#include "memory.h"
#include "network.h"
#include "parallel.h"
#include "product.h"

namespace fusedres {

constexpr int64_t COLUMNS = 64;  // of a product's result at a time: its epilogue finds them in the nearest cache

// A layer's vectors in C, and its matrices as the products want them.
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

}  // namespace fusedres
