// What is recorded of the gradient at each layer's input (`kernels/record.py`), taken while it lies in a cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "memory.h"
#include "network.h"
#include "number.h"
#include "parallel.h"
#include "recorded.h"
#include "tally.h"
#include "vector.h"

namespace fusedres {

// scale times these numbers, of rows ld apart: what came to a gradient through one of its two ways. Null: there is one way alone.
template <class T>
struct Half {
    const T *numbers = nullptr;
    int64_t ld = 0;
    bool is_skip = false;
    Compute<T> scale = 1;

    Half from(int64_t row, int64_t column) const {
        return numbers ? Half{numbers + row * ld + column, ld, is_skip, scale} : Half{};
    }
    Compute<T> at(int64_t row, int64_t column) const { return scale * wide(numbers[row * ld + column]); }
};

// One thread's records of all layers. A piece of numbers is taken in one pass, in the unit of the largest of the last one, so
// that squares of vanishing gradients do not vanish themselves; what fits no such unit is taken one by one.
template <class C>
class Record {
    using Bits = BitsOf<C>;
    using Lanes = typename Bits::Lanes;
    static constexpr int W = LANES<C>, GROUP = 4 * W;
    static constexpr int64_t PIECE = Tally<C>::MOST * W;
    static constexpr int MOST_UNIT = Bits::BIAS - 1;

    // [rows, columns] of a gradient, whole groups in each row, and of one of its halves, if there is one.
    struct Piece {
        const C *total;
        int64_t ld;
        Half<C> half;
        int64_t rows, columns, padding;  // zeros at its end that are not counted

        int64_t count() const { return rows * columns - padding; }
    };

  public:
    Record(int64_t layers, double unscale)
        : rows_(layers * recorded::COLUMNS), units_(size_t(layers)), unscale_(unscale) {
        std::fill(rows_.get(), rows_.get() + layers * recorded::COLUMNS, 0.0);
    }

    double *operator[](int64_t layer) const { return rows_.get() + layer * recorded::COLUMNS; }

    // A copy of what a gradient [rows, columns] is before the skip's half joins it: what came through the branch.
    Half<C> hold(const C *branch, int64_t ld, int64_t rows, int64_t columns) {
        if (room_ < rows * columns) held_ = Buffer<C>(room_ = rows * columns);
        for (int64_t r = 0; r < rows; r++) std::copy(branch + r * ld, branch + r * ld + columns, held_.get() + r * columns);
        return {held_.get(), columns};
    }

    // [rows, columns] of the gradient at the layer's input, whole, and of one of its halves.
    template <class T>
    void add(int64_t layer, const T *total, int64_t ld, int64_t rows, int64_t columns, Half<T> half) {
        if (ld == columns && (!half.numbers || half.ld == columns)) columns *= rows, rows = 1;
        if constexpr (std::is_same_v<T, C>) {  // whole groups as they lie
            const int64_t whole = columns / GROUP * GROUP;
            if (whole == columns || rows == 1) {
                for (int64_t c = 0; c < whole; c += PIECE) {
                    const int64_t width = std::min(PIECE, whole - c), height = PIECE / width;
                    for (int64_t r = 0; r < rows; r += height)
                        add_piece(layer, {total + r * ld + c, ld, half.from(r, c), std::min(height, rows - r), width, 0});
                }
                total += whole, half = half.from(0, whole), columns -= whole;
            }
        }
        C *some = pieces_.get(), *halves = half.numbers ? some + PIECE : nullptr;
        for (int64_t r = 0, filled = 0; r < rows; r++)
            for (int64_t c = 0; c < columns;) {
                const int64_t count = std::min(PIECE - filled, columns - c);
                for (int64_t i = 0; i < count; i++) some[filled + i] = wide(total[r * ld + c + i]);
                for (int64_t i = 0; halves && i < count; i++) halves[filled + i] = half.at(r, c + i);
                filled += count, c += count;
                if (filled < PIECE && (r + 1 < rows || c < columns)) continue;
                const int64_t padded = (filled + GROUP - 1) / GROUP * GROUP;
                std::fill(some + filled, some + padded, C(0));
                if (halves) std::fill(halves + filled, halves + padded, C(0));
                add_piece(layer, {some, padded, {halves, padded, half.is_skip}, 1, padded, padded - std::exchange(filled, 0)});
            }
    }

  private:
    // Of a piece in some unit: lanes add up.
    struct Sums {
        Vector<C> numbers = {}, squares = {}, first = {}, second = {}, product = {};
        Lanes largest = {};
        Tally<C> tally;
    };

    void add_piece(int64_t layer, const Piece &piece) {
        double *row = (*this)[layer];
        int &unit = units_[size_t(layer)];
        row[recorded::COUNT] += double(piece.count());
        for (int tries = 0; tries < 3; tries++) {
            const C factor = C(std::ldexp(unscale_, -unit));
            const Sums sums = piece.half.numbers ? sums_of_piece<true>(piece, factor) : sums_of_piece<false>(piece, factor);
            typename Bits::Integer largest = 0;
            for (int lane = 0; lane < W; lane++) largest = std::max(largest, typename Bits::Integer(sums.largest[lane]));
            const int exponent = Bits::exponent(largest);
            if (exponent > Bits::BIAS) break;  // one is not finite
            if (largest == 0 ? !piece.half.numbers || is_zero(piece) : exponent <= 0 && exponent >= -10) {
                if (!keep(row, piece, sums, unit)) break;
                row[recorded::LARGEST] = std::max(row[recorded::LARGEST], std::ldexp(double(Bits::number(largest)), unit));
                return;
            }
            if (largest == 0) break;
            unit = std::clamp(unit + exponent + 2, -MOST_UNIT, MOST_UNIT);  // the next ones may be somewhat larger
        }
        add_one_by_one(row, piece);
    }

    template <bool HALF>
    static Sums sums_of_piece(const Piece &piece, C factor) {
        Sums sums;
        const C half_factor = factor * piece.half.scale;
        auto magnitudes = [&](const C *total, const C *half) {
            const Vector<C> value = load(total) * factor;
            const Lanes bits = reinterpret_cast<Lanes>(value) & Bits::MAGNITUDE;
            sums.largest = bits > sums.largest ? bits : sums.largest;
            sums.numbers += reinterpret_cast<Vector<C>>(bits), sums.squares += value * value;
            if (HALF) {
                const Vector<C> one = load(half) * half_factor, other = value - one;
                sums.first += one * one, sums.second += other * other, sums.product += one * other;
            }
            return bits;
        };
        for (int64_t r = 0; r < piece.rows; r++) {
            const C *total = piece.total + r * piece.ld, *half = HALF ? piece.half.numbers + r * piece.half.ld : nullptr;
            for (int64_t i = 0; i < piece.columns; i += GROUP) {
                Lanes four[4];
                for (int v = 0; v < 4; v++) four[v] = magnitudes(total + i + v * W, HALF ? half + i + v * W : nullptr);
                sums.tally.add(four[0], four[1], four[2], four[3]);
            }
        }
        return sums;
    }

    // Adds what one pass has found; not, where halves were too large for the unit.
    bool keep(double *row, const Piece &piece, const Sums &sums, int unit) {
        auto total_of = [](Vector<C> lanes) {
            double total = 0;
            for (int lane = 0; lane < W; lane++) total += double(lanes[lane]);
            return total;
        };
        const double scale = std::ldexp(1.0, unit), square = scale * scale;
        if (piece.half.numbers) {
            const double first = total_of(sums.first), second = total_of(sums.second);
            if (!std::isfinite(first + second)) return false;
            row[piece.half.is_skip ? recorded::SKIP : recorded::BRANCH] += square * first;
            row[piece.half.is_skip ? recorded::BRANCH : recorded::SKIP] += square * second;
            row[recorded::PRODUCT] += square * total_of(sums.product);
        }
        row[recorded::SUM] += scale * total_of(sums.numbers), row[recorded::SQUARES] += square * total_of(sums.squares);
        uint32_t counts[Tally<C>::BINS];
        sums.tally.read(counts);
        for (int bin = 1; bin < Tally<C>::BINS; bin++)
            if (counts[bin]) row[recorded::OCTAVES + octave(unit + bin + 1 - Tally<C>::BINS)] += counts[bin];
        if (counts[0] > piece.padding) count_small(row, piece, int64_t(counts[0]) - piece.padding, C(std::ldexp(Tally<C>::SMALL, unit)));
        return true;
    }

    // Those below a bound, of which there are so many. Mostly they are 0.
    void count_small(double *row, const Piece &piece, int64_t count, C bound) {
        int64_t zeros = -piece.padding;
        for (int64_t r = 0; r < piece.rows; r++)
            for (int64_t c = 0; c < piece.columns; c++) zeros += number(piece, r, c) == C(0);
        row[recorded::ZEROS] += double(zeros), row[recorded::OCTAVES] += double(zeros);
        if (zeros == count) return;
        each(piece, [&](C value, C) {
            const C size = std::abs(value);
            if (size > 0 && size < bound) row[recorded::OCTAVES + octave_of(size)]++;
        });
    }

    // Any numbers at all, as doubles: each sum in the unit of its own largest.
    void add_one_by_one(double *row, const Piece &piece) {
        double largest = 0, largest_half = 0;
        each(piece, [&](C value, C half) {
            row[recorded::ZEROS] += value == C(0), row[recorded::OCTAVES + octave_of(std::abs(value))]++;
            if (!std::isfinite(value)) return;
            largest = std::max(largest, std::abs(double(value)));
            if (std::isfinite(half)) largest_half = std::max({largest_half, std::abs(double(half)), std::abs(double(value) - half)});
        });
        row[recorded::LARGEST] = std::max(row[recorded::LARGEST], largest);
        const double unit = unit_of(largest), unit_of_halves = unit_of(largest_half);
        each(piece, [&](C value, C half) {
            if (!std::isfinite(value)) return;
            const double size = std::abs(double(value)) / unit;
            row[recorded::SUM] += unit * size, row[recorded::SQUARES] += unit * unit * size * size;
            if (!piece.half.numbers) return;
            const double first = double(half) / unit_of_halves, second = (double(value) - half) / unit_of_halves;
            const double square = unit_of_halves * unit_of_halves;
            row[piece.half.is_skip ? recorded::SKIP : recorded::BRANCH] += square * first * first;
            row[piece.half.is_skip ? recorded::BRANCH : recorded::SKIP] += square * second * second;
            row[recorded::PRODUCT] += square * first * second;
        });
    }

    template <class Visit>
    void each(const Piece &piece, const Visit &visit) const {
        for (int64_t i = 0; i < piece.count(); i++) {
            const int64_t r = i / piece.columns, c = i % piece.columns;
            visit(number(piece, r, c), piece.half.numbers ? C(unscale_) * piece.half.at(r, c) : C(0));
        }
    }
    C number(const Piece &piece, int64_t r, int64_t c) const { return C(unscale_) * piece.total[r * piece.ld + c]; }

    static bool is_zero(const Piece &piece) {
        bool is_zero = true;
        for (int64_t r = 0; r < piece.rows; r++)
            for (int64_t c = 0; c < piece.columns; c++) is_zero &= piece.half.at(r, c) == C(0);
        return is_zero;
    }

    static int octave(int exponent) { return std::clamp(exponent + 127, 0, 254); }
    static int octave_of(C size) {
        const int exponent = Bits::exponent(Bits::magnitude(size));
        return exponent > Bits::BIAS ? 255 : octave(exponent);
    }
    static double unit_of(double largest) {
        return largest > 0 ? std::ldexp(1.0, std::clamp(std::ilogb(largest), -500, 500)) : 1.0;
    }

    Buffer<double> rows_;
    std::vector<int> units_;  // of each layer: the exponent of its unit
    double unscale_;
    Buffer<C> held_;
    int64_t room_ = 0;
    Buffer<C> pieces_{2 * PIECE};
};

// One record for each thread that a call has, empty where nothing is recorded.
template <class C>
using Records = std::vector<std::unique_ptr<Record<C>>>;

template <class C>
Records<C> records_of(const Call &call, int members) {
    Records<C> records{size_t(members)};
    if (call.record)
        for (auto &record : records) record = std::make_unique<Record<C>>(call.depth, call.unscale);
    return records;
}

// to [recorded::COLUMNS] += the threads' rows of a layer, in the order of threads.
template <class C>
void add_records(const Records<C> &records, int64_t layer, double *to) {
    for (const auto &record : records) {
        const double *row = record ? (*record)[layer] : nullptr;
        for (int64_t i = 0; row && i < recorded::COLUMNS; i++) to[i] = i == recorded::LARGEST ? std::max(to[i], row[i]) : to[i] + row[i];
    }
    to[recorded::SCALE] = 1;
}

template <class C>
void write_records(const Call &call, const Records<C> &records) {
    for (int64_t l = 0; call.record && l < call.depth; l++)
        add_records(records, l, call.record + call.layers[l].place * recorded::COLUMNS);
}

// Threads share what is long; of the rest each has every so many.
template <class T>
void record_numbers(const std::vector<Recorded> &all, double unscale, int threads, double *rows) {
    using C = Compute<T>;
    constexpr int64_t WORTH_A_THREAD = 1 << 15;
    int64_t numbers = 0;
    for (const Recorded &one : all) numbers += one.count;
    const int members = int(std::clamp<int64_t>(numbers / WORTH_A_THREAD, 1, threads));
    Records<C> records{size_t(members)};
    together(members, [&](const Team &team) {
        auto &mine = *(records[size_t(team.member)] = std::make_unique<Record<C>>(int64_t(all.size()), unscale));
        for (size_t i = 0; i < all.size(); i++) {
            const bool is_long = all[i].count >= members * WORTH_A_THREAD;
            if (!is_long && int(i % size_t(members)) != team.member) continue;
            const auto [first, last] = is_long ? team.share(all[i].count) : Team::Share{0, all[i].count};
            const T *total = static_cast<const T *>(all[i].total) + first;
            Half<T> half{};
            if (all[i].branch) half = {static_cast<const T *>(all[i].branch) + first, last - first};
            mine.add(int64_t(i), total, last - first, 1, last - first, half);
        }
    });
    for (size_t i = 0; i < all.size(); i++) add_records(records, int64_t(i), rows + int64_t(i) * recorded::COLUMNS);
}

}  // namespace fusedres
