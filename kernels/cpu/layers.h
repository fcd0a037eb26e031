// Wide layers: one after the other over all rows, in panels whose epilogue finds the product still in cache.
#pragma once

#include "blocks.h"

namespace fusedres {

constexpr int64_t PANEL_ROWS = 128;    // of a product at a time
constexpr int64_t SLICE_ROWS = 256;    // of the depth of dzᵀ h at a time
constexpr int64_t RECOMPUTED_ROWS = 2048;  // that backward computes again at a time, where forward kept nothing

// A grid of panels of rows times groups of column blocks, as many as give every member some.
struct Grid {
    int64_t rows, panels, groups, blocks_per_group, columns;

    Grid(int64_t M, int64_t columns_, int members) : columns(columns_) {
        const int64_t blocks = column_blocks(columns);
        rows = std::min(PANEL_ROWS, rounded_up(M, GRAIN));
        panels = (M + rows - 1) / rows;
        const int64_t wanted = panels % members == 0 || panels >= 8 * members ? 1 : 4 * members;
        groups = std::clamp<int64_t>(wanted, 1, blocks);
        blocks_per_group = (blocks + groups - 1) / groups;
        groups = (blocks + blocks_per_group - 1) / blocks_per_group;
    }

    int64_t pieces() const { return panels * groups; }
    Rows panel(const Call &call, int64_t piece) const {
        const int64_t first = piece / groups * rows, count = std::min(rows, call.M - first);
        return {first, count, rounded_up(count, GRAIN), call.first_row + first};
    }
    int64_t begin(int64_t piece) const { return piece % groups * blocks_per_group * COLUMNS; }
    int64_t end(int64_t piece) const { return std::min(columns, begin(piece) + blocks_per_group * COLUMNS); }
};

template <class T>
void forward_layers(const Call &call, T *y, T *kept) {
    const KeptLayout<T> layout(call);
    const int64_t width = widest(call), rows_kept = rounded_up(call.M, GRAIN);
    Buffer<T> turns(call.depth > 1 && !kept ? 2 * rows_kept * width : 0);
    const T *h = static_cast<const T *>(call.x);
    int64_t ldh = call.ldx;
    for (int64_t l = 0; l < call.depth; l++) {
        const Layer &layer = call.layers[l];
        const bool is_last = l + 1 == call.depth;
        const int64_t N = layer.N, ld = even<T>(N);
        auto slot = [&](int64_t offset) { return kept && offset >= 0 ? kept + offset * rows_kept : nullptr; };
        T *to = is_last && y ? y : !is_last && kept ? slot(layout[l + 1].input) : turns.get() + l % 2 * rows_kept * width;
        const bool is_padded = !(is_last && y);
        const bool needs_skip = layer.skip == Skip::projection && !slot(layout[l].skip);
        const ReadyLayers<T> ready(call, l, l + 1, false);
        together(call.threads, [&](const Team &team) {
            ready.pack(team);
            team.wait();
            const Grid grid(call.M, N, team.members);
            Buffer<T> x_copy(grid.rows * even<T>(layer.K)), skip(needs_skip ? grid.rows * ld : 0);
            Buffer<Compute<T>> z(grid.rows * COLUMNS);
            const Team::Share share = team.share(grid.pieces());
            for (int64_t piece = share.first; piece < share.last; piece++) {
                const Rows rows = grid.panel(call, piece);
                const int64_t r = rows.first;
                ForwardPanel<T> panel{};
                panel.h = l ? h + r * ldh : padded_input(call, rows, x_copy.get(), &panel.ldh);
                if (l) panel.ldh = ldh;
                panel.residual = static_cast<const T *>(call.residual) + (call.residual ? r * call.ldr : 0);
                panel.ldr = call.ldr;
                panel.ldy = is_padded ? ld : N;
                panel.y = to + r * panel.ldy;
                auto row = [&](int64_t offset) { return slot(offset) ? slot(offset) + r * ld : nullptr; };
                panel.slope = row(layout[l].slope), panel.branch = row(layout[l].branch);
                panel.skip = needs_skip ? skip.get() : row(layout[l].skip);
                forward_panel<T>(call.has_brgemm, ready[0], rows, panel, grid.begin(piece), grid.end(piece), z.get());
                if (is_padded && grid.end(piece) == N) zero_padding(panel.y, rows, N);
            }
            if (IN_PAIRS<T>) brgemm_release(true);
        });
        h = to, ldh = ld;
    }
}

// A matrix [N, K] in C to add to, or T where they are the same.
template <class T>
class Accumulator {
    using C = Compute<T>;

  public:
    Accumulator() = default;
    Accumulator(void *to, int64_t size) : to_(static_cast<T *>(to)), size_(to ? size : 0) {
        if constexpr (!std::is_same_v<T, C>) sums_ = Buffer<C>(size_);
    }
    C *get() const {
        if constexpr (std::is_same_v<T, C>)
            return to_;
        else
            return sums_.get();
    }
    void write(const Team &team) const {
        if constexpr (!std::is_same_v<T, C>) {
            const Team::Share share = team.share(size_);
            for (int64_t i = share.first; i < share.last; i++) to_[i] = narrow<T>(sums_[i]);
        }
    }

  private:
    T *to_ = nullptr;
    int64_t size_ = 0;
    Buffer<C> sums_;
};

// dW [N, K] (+)= dzᵀ h, by this member's share of its blocks. dz and h have rows for M and, where padded, zeros after them.
template <class T>
void wide_weight_gradient(const Call &call, const Team &team, int64_t N, int64_t K, const T *dz, int64_t lddz, const T *h,
                          int64_t ldh, Compute<T> *dweight, bool add) {
    // blocks of rows of dW, or of its columns too where the rows alone are too few to share
    const int64_t n_blocks = column_blocks(N), k_blocks = column_blocks(K);
    const bool by_rows = n_blocks >= k_blocks;
    const Team::Share mine = team.share(by_rows ? n_blocks : k_blocks);
    const int64_t n_first = by_rows ? mine.first : 0, n_last = by_rows ? mine.last : n_blocks;
    const int64_t k_first = by_rows ? 0 : mine.first, k_last = by_rows ? k_blocks : mine.last;
    if (n_first == n_last || k_first == k_last) return;
    Buffer<T> turned((n_last - n_first) * COLUMNS * SLICE_ROWS), slice(SLICE_ROWS * COLUMNS);
    for (int64_t m = 0; m < call.M; m += SLICE_ROWS, add = true) {
        const int64_t given = std::min(SLICE_ROWS, call.M - m), depth = rounded_up(given, GRAIN);
        for (int64_t b = n_first; b < n_last; b++) {
            T *to = turned.get() + (b - n_first) * COLUMNS * SLICE_ROWS;
            const int64_t n = b * COLUMNS, width = std::min(COLUMNS, N - n);
            turn(dz + m * lddz + n, lddz, given, depth, width, to);
        }
        for (int64_t b = k_first; b < k_last; b++) {
            const int64_t k = b * COLUMNS, k_width = std::min(COLUMNS, K - k);
            pack<T>(h + m * ldh + k, ldh, given, depth, k_width, slice.get());
            for (int64_t c = n_first; c < n_last; c++) {
                const int64_t n = c * COLUMNS, n_width = std::min(COLUMNS, N - n);
                product<T>(call.has_brgemm, n_width, k_width, depth, turned.get() + (c - n_first) * COLUMNS * SLICE_ROWS,
                           depth, slice.get(), k_width, dweight + n * K + k, K, add);
            }
        }
    }
}

// What backward carries from layer to layer, and from rows to rows.
template <class T>
struct LayersState {
    using C = Compute<T>;
    Buffer<C> g[2];
    Buffer<T> dz, ds;
    std::vector<Accumulator<T>> dweight, dprojection;
    std::vector<std::unique_ptr<Gradients<T>>> sums;  // by thread
    Records<C> records;

    LayersState(const Call &call, int64_t rows, int64_t width)
        : sums(size_t(call.threads)), records(records_of<C>(call, call.threads)) {
        for (Buffer<C> &gradient : g) gradient = Buffer<C>(rows * width);
        dz = Buffer<T>(rows * width);
        bool has_projection = false;
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            dweight.emplace_back(layer.dweight, layer.N * layer.K);
            dprojection.emplace_back(layer.dprojection, layer.N * layer.K);
            has_projection |= layer.skip == Skip::projection;
        }
        if (has_projection) ds = Buffer<T>(rows * width);
    }
};

// ∂L/∂y in C as it lies, where it need not be widened and is not written to; else null.
template <class T>
Compute<T> *top_gradient(const Layer &layer, const T *g, int64_t ldg) {
    if constexpr (std::is_same_v<T, Compute<T>>) {
        if (ldg == layer.N && !layer.activates_sum()) return const_cast<T *>(g);
    }
    return nullptr;
}

// to [rows.padded, columns] = a half of it, and zeros where there are no rows.
template <class C>
void start_with(const Half<C> &half, const Rows &rows, int64_t columns, C *to, int64_t ld) {
    for (int64_t r = 0; r < rows.padded; r++)
        for (int64_t c = 0; c < columns; c++) to[r * ld + c] = r < rows.count ? half.at(r, c) : C(0);
}

template <class T>
void backward_layers_rows(const Call &call, const T *g, int64_t ldg, const T *kept, T *dx, T *dresidual,
                          LayersState<T> &state, bool is_first) {
    using C = Compute<T>;
    const KeptLayout<T> layout(call);
    const int64_t width = widest(call), rows_kept = rounded_up(call.M, GRAIN);
    for (int64_t l = call.depth - 1; l >= 0; l--) {
        const Layer &layer = call.layers[l];
        const int64_t N = layer.N, K = layer.K, ld = even<T>(N);
        auto slot = [&](int64_t offset) { return offset >= 0 ? kept + offset * rows_kept : nullptr; };
        const T *h = l ? slot(layout[l].input) : static_cast<const T *>(call.x);
        const int64_t ldh = l ? even<T>(K) : call.ldx;
        const bool wants_dh = l > 0 || dx, is_identity = layer.skip == Skip::identity;
        C *top = l + 1 == call.depth ? top_gradient(layer, g, ldg) : nullptr;
        C *given = top ? top : state.g[l % 2].get(), *next = state.g[(l + 1) % 2].get();
        T *dz = state.dz.get(), *ds = state.ds.get();
        const ReadyLayers<T> ready(call, l, l + 1, true);
        together(call.threads, [&](const Team &team) {
            ready.pack(team);
            team.wait();
            std::unique_ptr<Gradients<T>> &mine = state.sums[size_t(team.member)];
            if (!mine) mine = std::make_unique<Gradients<T>>(call, false, false);

            // dz, ds, and the sums over rows
            const int64_t strips = (call.M + GRAIN - 1) / GRAIN;
            const Team::Share strip = team.share(strips);
            Buffer<C> line(2 * width);
            for (int64_t first = strip.first * GRAIN; first < std::min(strip.last * GRAIN, call.M); first += COLUMNS) {
                const int64_t count = std::min({COLUMNS, strip.last * GRAIN - first, call.M - first});
                const Rows rows{first, count, rounded_up(count, GRAIN), call.first_row + first};
                BackwardPanel<T> panel{};
                panel.g = given + first * N;
                if (l + 1 == call.depth && !top) widen_rows(g + first * ldg, ldg, count, N, panel.g, N);
                auto row = [&](int64_t offset) { return slot(offset) ? slot(offset) + first * ld : nullptr; };
                panel.slope = row(layout[l].slope), panel.branch = row(layout[l].branch), panel.ld = ld;
                panel.s = h + first * ldh, panel.lds = ldh;
                panel.dz = dz + first * ld, panel.ldds = ld;
                if (layer.skip == Skip::projection)
                    panel.s = row(layout[l].skip), panel.lds = ld, panel.ds = ds + first * ld;
                if (layer.skip == Skip::residual) {
                    panel.s = static_cast<const T *>(call.residual) + first * call.ldr, panel.lds = call.ldr;
                    if (dresidual) panel.ds = dresidual + first * N, panel.ldds = N;
                }
                backward_panel<T>(ready[0], rows, panel, mine->sums[size_t(l)], line.get());
                zero_padding(panel.dz, rows, N);
                if (layer.skip == Skip::projection) zero_padding(panel.ds, rows, N);
            }
            team.wait();

            // dh = λ g + dz W
            if (wants_dh) {
                const Grid grid(call.M, K, team.members);
                const Team::Share share = team.share(grid.pieces());
                Record<C> *record = state.records[size_t(team.member)].get();
                for (int64_t piece = share.first; piece < share.last; piece++) {
                    const Rows rows = grid.panel(call, piece);
                    const int64_t r = rows.first, begin = grid.begin(piece), end = grid.end(piece);
                    C *to = next + r * K;
                    Half<C> half{};
                    if (is_identity) {
                        half = {given + r * K + begin, K, true, C(layer.skip_scale)};
                        start_with(half, rows, end - begin, to + begin, K);
                    }
                    input_gradient<T>(call.has_brgemm, layer, rows, dz + r * ld, ld, ready[0].weight_back, to, is_identity,
                                      begin, end, layer.is_dropped);
                    if (layer.skip == Skip::projection) {
                        if (record) half = record->hold(to + begin, K, rows.count, end - begin);
                        input_gradient<T>(call.has_brgemm, layer, rows, ds + r * ld, ld, ready[0].projection_back, to, true,
                                          begin, end);
                    }
                    if (record) record->add(l, to + begin, K, rows.count, end - begin, half);
                    if (l == 0)
                        for (int64_t i = r; i < r + rows.count; i++)
                            for (int64_t k = begin; k < end; k++) dx[i * K + k] = narrow<T>(next[i * K + k]);
                }
            }
            if (C *to = state.dweight[size_t(l)].get())
                wide_weight_gradient(call, team, N, K, dz, ld, h, ldh, to, !is_first);
            if (C *to = state.dprojection[size_t(l)].get())
                wide_weight_gradient(call, team, N, K, ds, ld, h, ldh, to, !is_first);
            if (IN_PAIRS<T>) brgemm_release(true);
        });
    }
}

template <class T>
void backward_layers(const Call &call, const T *g, int64_t ldg, const T *kept, T *dx, T *dresidual) {
    const int64_t width = widest(call), rows = kept ? call.M : std::min(call.M, RECOMPUTED_ROWS);
    const int64_t N = call.layers[call.depth - 1].N, K = call.layers[0].K;
    LayersState<T> state(call, rounded_up(rows, GRAIN), width);
    Buffer<T> recomputed(kept ? 0 : rounded_up(rows, GRAIN) * (KeptLayout<T>(call).row_elements() + 2 * width));
    for (int64_t first = 0; first < call.M; first += rows) {
        Call some = call;
        some.M = std::min(rows, call.M - first), some.first_row = call.first_row + first;
        some.x = static_cast<const T *>(call.x) + first * call.ldx;
        if (call.residual) some.residual = static_cast<const T *>(call.residual) + first * call.ldr;
        if (!kept) {
            const int64_t at = rounded_up(some.M, GRAIN) * KeptLayout<T>(call).row_elements();
            forward_layers<T>(some, recomputed.get() + at, recomputed.get());
        }
        backward_layers_rows<T>(some, g + first * ldg, ldg, kept ? kept : recomputed.get(), dx ? dx + first * K : nullptr,
                                dresidual ? dresidual + first * N : nullptr, state, first == 0);
    }
    together(call.threads, [&](const Team &team) {
        for (size_t l = 0; l < size_t(call.depth); l++) state.dweight[l].write(team), state.dprojection[l].write(team);
    });
    std::vector<Sums> &sums = state.sums[0]->sums;
    for (size_t l = 0; l < size_t(call.depth); l++) {
        for (size_t t = 1; t < state.sums.size(); t++)
            if (state.sums[t]) sums[l].add(call.layers[l], state.sums[t]->sums[l]);
        write_sums<T>(call.layers[l], sums[l]);
    }
    write_records(call, state.records);
}

}  // namespace fusedres
