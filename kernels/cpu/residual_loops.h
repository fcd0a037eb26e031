// The loops of residual.h: each number is read once and written once, a line of numbers at a time.
#pragma once

#include <algorithm>

#include "memory.h"
#include "parallel.h"
#include "philox.h"
#include "residual.h"
#include "wide.h"

namespace fusedres {

constexpr int64_t LINE = 2048;  // numbers, all that is read and written of which stays in L1, or nearly
constexpr int64_t MOST_SHARES = 64, LINES_TO_A_SHARE = 8;

// The stretches of a call cut into lines. With an a per column, a line is whole rows of a, or a part of one.
template <class T>
struct Lines {
    using C = Compute<T>;

    explicit Lines(const Residual &call) : call(call), length(call.length), longest(LINE) {
        const int64_t K = call.channels;
        if (call.per == Per::column) {
            if (K > LINE)
                length = K;
            else
                longest = LINE / K * K;
            scales = Buffer<C>(K > LINE ? K : longest);
            const C *a = static_cast<const C *>(call.scales);
            for (int64_t i = 0; i < std::max(K, longest); i++) scales[i] = a[i % K];
        }
        stretches = call.stretches * (call.length / length);
        pieces = (length + longest - 1) / longest;
        width = K > LINE ? K : longest;
        shares = std::clamp<int64_t>(count() / LINES_TO_A_SHARE, 1, MOST_SHARES);
    }

    struct Line {
        int64_t index, first, count;  // numbers first, …, first + count - 1
        int64_t column;
        bool is_kept;
        C factor;  // all of f but for an a per column
    };

    // work(line) for the lines of one share, in order.
    template <class Work>
    void each(int64_t share, const Work &work) const {
        const int64_t end = count() * (share + 1) / shares, run = stretches / call.samples;
        int64_t l = count() * share / shares, stretch = l / pieces, piece = l % pieces;
        for (; l < end; stretch++, piece = 0) {
            const int64_t sample = call.samples > 1 ? stretch / run : 0;
            const bool is_kept = fusedres::is_kept(call.seed, call.drop_threshold, sample);
            double a = call.branch_scale;
            if (call.per == Per::stretch) a = double(static_cast<const C *>(call.scales)[stretch % call.channels]);
            if (call.per == Per::column) a = 1;
            const C factor = C(a * (is_kept ? keep_scale() : 0));
            for (; piece < pieces && l < end; piece++, l++) {
                const int64_t column = piece * longest;
                work(Line{l, stretch * length + column, std::min(longest, length - column), column, is_kept, factor});
            }
        }
    }
    // What an a per column begins with where the line does.
    const C *scales_of(const Line &line) const { return scales.get() + (call.channels > LINE ? line.column : 0); }
    int64_t count() const { return stretches * pieces; }
    double keep_scale() const { return call.drop_threshold ? call.keep_scale : 1; }

    const Residual &call;
    int64_t stretches, length, longest, pieces;
    int64_t shares;  // of the lines, each with sums of its own: as many at any number of threads
    int64_t width;  // of what a line's columns are counted in
    Buffer<C> scales;
};

// All shares, among as many threads as the call asks for.
template <class T, class Work>
void in_shares(const Lines<T> &lines, const Work &work) {
    together(lines.call.threads, [&](const Team &team) {
        const Team::Share mine = team.share(lines.shares);
        for (int64_t share = mine.first; share < mine.last; share++) work(share);
    });
}

template <class T>
void residual_forward(const Residual &call) {
    using C = Compute<T>;
    const Lines<T> lines(call);
    const C lambda = C(call.skip_scale);
    in_shares(lines, [&](int64_t share) {
        lines.each(share, [&](const auto &line) {
            const T *__restrict b = static_cast<const T *>(call.branch) + line.first;
            const T *__restrict x = static_cast<const T *>(call.x) + line.first;
            T *__restrict y = static_cast<T *>(call.y) + line.first;
            const int64_t n = line.count;
            const C f = line.factor;
            if (!line.is_kept) {
                for (int64_t i = 0; i < n; i++) y[i] = narrow<T>(lambda * wide(x[i]));
            } else if (call.per == Per::column) {
                const C *__restrict a = lines.scales_of(line);
                for (int64_t i = 0; i < n; i++) y[i] = narrow<T>(f * a[i] * wide(b[i]) + lambda * wide(x[i]));
            } else {
                for (int64_t i = 0; i < n; i++) y[i] = narrow<T>(f * wide(b[i]) + lambda * wide(x[i]));
            }
        });
    });
}

// Σ a b over n numbers.
template <class T>
inline double dot(int64_t n, const T *a, const T *b) {
    using C = Compute<T>;
    constexpr int W = LANES<C>, AT_ONCE = 4;
    Vector<C> sums[AT_ONCE] = {};
    int64_t i = 0;
    for (; i + AT_ONCE * W <= n; i += AT_ONCE * W)
        for (int j = 0; j < AT_ONCE; j++) sums[j] += load_wide(a + i + j * W) * load_wide(b + i + j * W);
    for (; i + W <= n; i += W) sums[0] += load_wide(a + i) * load_wide(b + i);
    if (i < n) sums[1] += load_some(a + i, n - i) * load_some(b + i, n - i);
    const Vector<C> all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double total = 0;
    for (int j = 0; j < W; j++) total += double(all[j]);
    return total;
}

// Partial sums of a call: of each share, and da of each line, or of each column of each share, where a has such parts.
template <class T>
struct PartialSums {
    explicit PartialSums(const Lines<T> &lines)
        : width(lines.call.per == Per::column ? lines.width : 1), dlambda(lines.shares),
          da(!lines.call.dbranch_scale ? 0 : lines.call.per == Per::stretch ? lines.count() : lines.shares * width) {
        std::fill_n(dlambda.get(), lines.shares, 0.0);
        if (lines.call.dbranch_scale && lines.call.per != Per::stretch) std::fill_n(da.get(), lines.shares * width, 0.0);
    }

    // Adds them up in their order.
    void finish(const Lines<T> &lines) const {
        const Residual &call = lines.call;
        const int64_t K = call.channels;
        if (call.dskip_scale) *call.dskip_scale = 0;
        for (int64_t share = 0; call.dskip_scale && share < lines.shares; share++) *call.dskip_scale += dlambda[share];
        double *__restrict to = call.dbranch_scale;
        if (!to) return;
        std::fill_n(to, K, 0.0);
        if (call.per == Per::stretch)
            for (int64_t l = 0, stretch = 0; stretch < lines.stretches; stretch++)
                for (int64_t piece = 0; piece < lines.pieces; piece++) to[stretch % K] += da[l++];
        else
            for (int64_t row = 0; row < lines.shares * width; row += K)
                for (int64_t k = 0; k < K; k++) to[k] += da[row + k];
    }

    int64_t width;
    Buffer<double> dlambda, da;
};

template <class T>
void residual_backward(const Residual &call) {
    using C = Compute<T>;
    const Lines<T> lines(call);
    const PartialSums<T> sums(lines);
    const C lambda = C(call.skip_scale);
    in_shares(lines, [&](int64_t share) {
        lines.each(share, [&](const auto &line) {
            const int64_t n = line.count;
            const C f = line.factor;
            const T *__restrict g = static_cast<const T *>(call.g) + line.first;
            if (call.dx) {
                T *__restrict dx = static_cast<T *>(call.dx) + line.first;
                for (int64_t i = 0; i < n; i++) dx[i] = narrow<T>(lambda * wide(g[i]));
            }
            if (call.dbranch) {
                T *__restrict db = static_cast<T *>(call.dbranch) + line.first;
                const C *__restrict a = lines.scales_of(line);
                if (!line.is_kept)
                    std::fill_n(db, n, T{});
                else if (call.per == Per::column)
                    for (int64_t i = 0; i < n; i++) db[i] = narrow<T>(f * a[i] * wide(g[i]));
                else
                    for (int64_t i = 0; i < n; i++) db[i] = narrow<T>(f * wide(g[i]));
            }
            if (call.dskip_scale) sums.dlambda[share] += dot(n, g, static_cast<const T *>(call.x) + line.first);
            if (!call.dbranch_scale) return;
            const T *__restrict b = static_cast<const T *>(call.branch) + line.first;
            if (call.per == Per::column) {
                double *__restrict da = sums.da.get() + share * sums.width + (call.channels > LINE ? line.column : 0);
                for (int64_t i = 0; line.is_kept && i < n; i++) da[i] += double(f * wide(g[i])) * double(wide(b[i]));
                return;
            }
            const double da = line.is_kept ? lines.keep_scale() * dot(n, g, b) : 0;
            if (call.per == Per::stretch)
                sums.da[line.index] = da;
            else
                sums.da[share] += da;
        });
    });
    sums.finish(lines);
}

}  // namespace fusedres
