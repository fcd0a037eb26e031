// Blocks of rows go through all layers, so that activations stay in the nearest caches; threads share the blocks.
#pragma once

#include <utility>

#include "gradients.h"
#include "record.h"
#include "wide.h"

namespace fusedres {

constexpr int64_t GRAIN = 16;  // rows come in multiples of it: few shapes of products, each compiled once by oneDNN

inline int64_t rounded_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

inline int64_t widest(const Call &call) {
    int64_t widest = 0;
    for (int64_t l = 0; l < call.depth; l++) widest = std::max({widest, call.layers[l].N, call.layers[l].K});
    return rounded_up(widest, 2);
}

// Rows per block: at most `most`, fewer where that gives every thread some.
inline int64_t block_rows(const Call &call, int64_t most) {
    return std::clamp(rounded_up((call.M + call.threads - 1) / call.threads, GRAIN), GRAIN, most);
}

// Where the layers of one block of rows find their inputs and leave what backward reads.
template <class T>
struct BlockMemory {
    T *kept;             // null where nothing is kept
    int64_t rows;        // that kept has memory for
    int64_t first;       // of them
    T *x, *h[2], *skip;  // scratch of a block: a padded copy of x, activations in turn, a projected skip
    Compute<T> *z;

    T *slot(int64_t offset, int64_t ld) const { return offset < 0 ? nullptr : kept + offset * rows + first * ld; }
};

// x as the products read it: as it lies, or a padded copy where rows or a column are missing.
template <class T>
const T *padded_input(const Call &call, const Rows &rows, T *copy, int64_t *ld) {
    const int64_t K = call.layers[0].K;
    const T *x = static_cast<const T *>(call.x) + rows.first * call.ldx;
    *ld = call.ldx;
    if (rows.count == rows.padded && even<T>(K) == K) return x;
    *ld = even<T>(K);
    copy_rows(x, call.ldx, rows, K, copy);
    return copy;
}

template <class T>
void forward_block(const Call &call, const ReadyLayers<T> &ready, const KeptLayout<T> &layout, const Rows &rows,
                   const BlockMemory<T> &memory, T *y) {
    int64_t ldh;
    const T *h = padded_input(call, rows, memory.x, &ldh);
    for (int64_t l = 0; l < call.depth; l++) {
        const Layer &layer = call.layers[l];
        const bool is_last = l + 1 == call.depth, keeps = memory.kept != nullptr;
        const int64_t ld = even<T>(layer.N);
        ForwardPanel<T> panel{};
        panel.h = h, panel.ldh = ldh;
        panel.residual = static_cast<const T *>(call.residual) + (call.residual ? rows.first * call.ldr : 0);
        panel.ldr = call.ldr;
        if (is_last && y)
            panel.y = y, panel.ldy = layer.N;
        else
            panel.y = keeps && !is_last ? memory.slot(layout[l + 1].input, ld) : memory.h[l % 2], panel.ldy = ld;
        panel.skip = memory.skip;
        if (keeps) {
            panel.slope = memory.slot(layout[l].slope, ld);
            panel.branch = memory.slot(layout[l].branch, ld);
            if (layout[l].skip >= 0) panel.skip = memory.slot(layout[l].skip, ld);
        }
        forward_panel<T>(call.has_brgemm, ready[l], rows, panel, 0, layer.N, memory.z);
        if (!is_last) zero_padding(panel.y, rows, layer.N);
        h = panel.y, ldh = ld;
    }
}

template <class T>
void forward_blocks(const Call &call, T *y, T *kept) {
    const int64_t R = block_rows(call, 64), width = widest(call), blocks = (call.M + R - 1) / R;
    const KeptLayout<T> layout(call);
    const ReadyLayers<T> ready(call, 0, call.depth, false);
    const int64_t N = call.layers[call.depth - 1].N;
    together(int(std::min<int64_t>(call.threads, blocks)), [&](const Team &team) {
        Buffer<T> scratch(4 * R * width);
        Buffer<Compute<T>> z(R * COLUMNS);
        ready.pack(team);
        team.wait();
        BlockMemory<T> memory{};
        memory.kept = kept, memory.rows = rounded_up(call.M, GRAIN);
        memory.x = scratch.get(), memory.h[0] = memory.x + R * width, memory.h[1] = memory.h[0] + R * width;
        memory.skip = memory.h[1] + R * width, memory.z = z.get();
        Team::Share share = team.share(blocks);
        for (int64_t b = share.first; b < share.last; b++) {
            const int64_t count = std::min(R, call.M - b * R);
            Rows rows{b * R, count, rounded_up(count, GRAIN), call.first_row + b * R};
            memory.first = rows.first;
            forward_block(call, ready, layout, rows, memory, y + rows.first * N);
        }
        if (IN_PAIRS<T>) brgemm_release(true);
    });
}

// ------------------------------------------------------------------------------------------------ backward

template <class T>
struct BackwardMemory {
    Compute<T> *g[2], *line;
    T *dz, *ds, *turned, *pairs;  // dzᵀ, and h in pairs, as the dW product wants them
};

// dW [N, K] (+)= dzᵀ h over the rows of a panel
template <class T>
void weight_gradient(bool has_brgemm, int64_t N, int64_t K, const Rows &rows, const T *dz, int64_t lddz, const T *h,
                     int64_t ldh, Compute<T> *dweight, bool add, const BackwardMemory<T> &memory) {
    if (!has_brgemm) {
        if constexpr (!IN_PAIRS<T>) own_product<T>(N, K, rows.padded, dz, 1, lddz, h, ldh, dweight, K, add);
        return;
    }
    const int64_t R = rows.padded;
    turn<T>(dz, lddz, R, R, N, memory.turned);
    if constexpr (IN_PAIRS<T>) pack<T>(h, ldh, R, R, K, memory.pairs);
    product<T>(true, N, K, R, memory.turned, R, IN_PAIRS<T> ? memory.pairs : h, IN_PAIRS<T> ? K : ldh, dweight, K, add);
}

// Columns [begin, end) of dh [rows, K] (+)= dz W, W in blocks of COLUMNS, or as it lies; is_zero: dz is 0
template <class T>
void input_gradient(bool has_brgemm, const Layer &layer, const Rows &rows, const T *dz, int64_t lddz, const T *weight,
                    Compute<T> *dh, bool add, int64_t begin, int64_t end, bool is_zero = false) {
    if (is_zero) {
        for (int64_t r = 0; !add && r < rows.padded; r++) std::fill(dh + r * layer.K + begin, dh + r * layer.K + end, Compute<T>(0));
        return;
    }
    const bool is_packed = ReadyLayers<T>::packs_back(layer);
    for (int64_t k = begin; k < end; k += COLUMNS) {
        const int64_t width = std::min(COLUMNS, end - k);
        product<T>(has_brgemm, rows.padded, width, even<T>(layer.N), dz, lddz,
                   is_packed ? weight + block_offset<T>(layer.N, k) : weight + k, is_packed ? width : layer.K, dh + k,
                   layer.K, add);
    }
}

template <class T>
void backward_block(const Call &call, const ReadyLayers<T> &ready, const KeptLayout<T> &layout, const Rows &rows,
                    const BlockMemory<T> &forward, const BackwardMemory<T> &memory, Gradients<T> &gradients,
                    Record<Compute<T>> *record, T *dx, T *dresidual) {
    using C = Compute<T>;
    for (int64_t l = call.depth - 1; l >= 0; l--) {
        const Layer &layer = call.layers[l];
        const int64_t N = layer.N, K = layer.K, ld = even<T>(N);
        int64_t ldh = even<T>(K);
        const T *h = l ? forward.slot(layout[l].input, ldh) : padded_input(call, rows, forward.x, &ldh);
        const bool wants_dh = l > 0 || dx;

        BackwardPanel<T> panel{};
        panel.g = memory.g[l % 2], panel.dh = wants_dh ? memory.g[(l + 1) % 2] : nullptr;
        panel.slope = forward.slot(layout[l].slope, ld), panel.branch = forward.slot(layout[l].branch, ld);
        panel.s = h, panel.lds = ldh, panel.ld = ld;
        panel.dz = memory.dz, panel.ldds = ld;
        if (layer.skip == Skip::projection) {
            panel.s = forward.slot(layout[l].skip, ld), panel.lds = ld, panel.ds = memory.ds;
        } else if (layer.skip == Skip::residual) {
            panel.s = static_cast<const T *>(call.residual) + rows.first * call.ldr, panel.lds = call.ldr;
            if (dresidual) panel.ds = dresidual + rows.first * N, panel.ldds = N;
        }
        backward_panel<T>(ready[l], rows, panel, gradients.sums[size_t(l)], memory.line);
        zero_padding(panel.dz, rows, N);
        if (layer.skip == Skip::projection) zero_padding(panel.ds, rows, N);

        if (wants_dh) {
            const bool adds_skip = layer.skip == Skip::identity;
            if (adds_skip) std::fill(panel.dh + rows.count * K, panel.dh + rows.padded * K, C(0));
            Half<C> half{};
            if (adds_skip) half = {panel.g, K, true, C(layer.skip_scale)};
            input_gradient<T>(call.has_brgemm, layer, rows, panel.dz, ld, ready[l].weight_back, panel.dh, adds_skip, 0, K,
                              layer.is_dropped);
            if (layer.skip == Skip::projection) {
                if (record) half = record->hold(panel.dh, K, rows.count, K);
                input_gradient<T>(call.has_brgemm, layer, rows, panel.ds, ld, ready[l].projection_back, panel.dh, true, 0, K);
            }
            if (record) record->add(l, panel.dh, K, rows.count, K, half);
        }

        const bool add = !gradients.is_empty;
        if (C *dweight = gradients.dweight[size_t(l)])
            weight_gradient<T>(call.has_brgemm, N, K, rows, panel.dz, ld, h, ldh, dweight, add, memory);
        if (C *dprojection = gradients.dprojection[size_t(l)])
            weight_gradient<T>(call.has_brgemm, N, K, rows, panel.ds, ld, h, ldh, dprojection, add, memory);
    }
    gradients.is_empty = false;
    if (dx) {
        const int64_t K = call.layers[0].K;
        const C *from = memory.g[1];  // where layer 0 left its dh
        for (int64_t i = 0; i < rows.count * K; i++) dx[rows.first * K + i] = narrow<T>(from[i]);
    }
}

template <class T>
void backward_blocks(const Call &call, const T *g, int64_t ldg, const T *kept, T *dx, T *dresidual) {
    using C = Compute<T>;
    const int64_t R = block_rows(call, 64), width = widest(call), blocks = (call.M + R - 1) / R;
    const KeptLayout<T> layout(call);
    std::unique_ptr<ReadyLayers<T>> forwards(kept ? nullptr : new ReadyLayers<T>(call, 0, call.depth, false));
    const ReadyLayers<T> ready(call, 0, call.depth, true);
    const int64_t N = call.layers[call.depth - 1].N;
    const int members = int(std::min<int64_t>(call.threads, blocks));
    std::vector<std::unique_ptr<Gradients<T>>> gradients{size_t(members)};
    const Records<C> records = records_of<C>(call, members);
    together(members, [&](const Team &team) {
        Gradients<T> &mine = *(gradients[size_t(team.member)] = std::make_unique<Gradients<T>>(call, true, team.member == 0));
        Buffer<T> scratch(8 * R * width), recomputed(kept ? 0 : R * layout.row_elements());
        Buffer<C> wide_scratch(R * COLUMNS + (2 * R + 2) * width);
        ready.pack(team);
        if (forwards) forwards->pack(team);
        team.wait();

        T *at = scratch.get();
        auto take = [&] { return std::exchange(at, at + R * width); };
        BlockMemory<T> forward{};
        forward.x = take(), forward.h[0] = take(), forward.h[1] = take(), forward.skip = take();
        forward.z = wide_scratch.get();
        BackwardMemory<T> memory{};
        memory.dz = take(), memory.ds = take(), memory.turned = take(), memory.pairs = take();
        memory.g[0] = forward.z + R * COLUMNS, memory.g[1] = memory.g[0] + R * width, memory.line = memory.g[1] + R * width;

        Team::Share share = team.share(blocks);
        for (int64_t b = share.first; b < share.last; b++) {
            const int64_t count = std::min(R, call.M - b * R);
            Rows rows{b * R, count, rounded_up(count, GRAIN), call.first_row + b * R};
            if (kept) {
                forward.kept = const_cast<T *>(kept), forward.rows = rounded_up(call.M, GRAIN), forward.first = rows.first;
            } else {
                forward.kept = recomputed.get(), forward.rows = R, forward.first = 0;
                forward_block(call, *forwards, layout, rows, forward, static_cast<T *>(nullptr));
            }
            C *top = memory.g[(call.depth - 1) % 2];
            widen_rows(g + rows.first * ldg, ldg, rows.count, N, top, N);
            backward_block(call, ready, layout, rows, forward, memory, mine, records[size_t(team.member)].get(), dx, dresidual);
        }
        if (IN_PAIRS<T>) brgemm_release(true);
        team.wait();
        write_gradients(team, call, gradients);
    });
    write_records(call, records);
}

}  // namespace fusedres
