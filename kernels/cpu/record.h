// What is recorded of the gradient at each layer's input (`kernels/record.py`), taken while it lies in a cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "memory.h"
#include "network.h"
#include "number.h"
#include "parallel.h"
#include "recorded.h"
#include "vector.h"

namespace fusedres {

// The bits of a number without its sign, and its exponent as a float32's.
template <class C>
struct BitsOf {
    using Integer = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
    typedef Integer Lanes __attribute__((vector_size(VECTOR_BYTES), may_alias));
    static constexpr Integer MAGNITUDE = sizeof(C) == 4 ? Integer(0x7fffffff) : Integer(0x7fffffffffffffff);
    static constexpr int MANTISSA = sizeof(C) == 4 ? 23 : 52;
    static constexpr Integer BIAS = sizeof(C) == 4 ? 0 : 1023 - 127, NOT_FINITE = sizeof(C) == 4 ? 255 : 2047;

    // Of whole vectors: a float32's exponent as it is, others as far as it reaches.
    static void store_octaves(uint8_t *to, Lanes exponents) {
        typedef uint8_t Bytes __attribute__((vector_size(LANES<C>)));
        if (sizeof(C) == 8) {
            const Lanes zero = {}, most = zero + 254, far = exponents - BIAS;
            const Lanes inside = far < zero ? zero : far > most ? most : far;
            exponents = exponents == zero + NOT_FINITE ? zero + 255 : inside;
        }
        const Bytes bytes = __builtin_convertvector(exponents, Bytes);
        std::memcpy(to, &bytes, sizeof bytes);
    }
    static uint8_t octave(Integer magnitude) {
        const Integer exponent = magnitude >> MANTISSA;
        return uint8_t(exponent == NOT_FINITE ? 255 : std::clamp<Integer>(exponent - BIAS, 0, 254));
    }
    static Integer magnitude(C value) {
        Integer bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits & MAGNITUDE;
    }
};

// A power of two of about that size, whose inverse is a C and whose square a double.
template <class C>
double power_near(double size) {
    constexpr int most = sizeof(C) == 4 ? 120 : 500;
    return size > 0 && std::isfinite(size) ? std::ldexp(1.0, std::clamp(std::ilogb(size), -most, most)) : 1.0;
}

// One thread's records of all layers. Sums are taken piece by piece, each divided by its largest number, so that squares of
// vanishing gradients do not vanish themselves.
template <class C>
class Record {
    static constexpr int64_t PIECE = 2048, ROOM = PIECE + LANES<C>;
    using Bits = BitsOf<C>;

  public:
    Record(int64_t layers, double unscale)
        : rows_(layers * recorded::COLUMNS), unscale_(C(unscale)) {
        std::fill(rows_.get(), rows_.get() + layers * recorded::COLUMNS, 0.0);
    }

    double *operator[](int64_t layer) const { return rows_.get() + layer * recorded::COLUMNS; }

    // What a gradient [rows, columns] is before its second half joins it, until `add` is told.
    void hold(const C *half, int64_t ld, int64_t rows, int64_t columns, bool is_skip) {
        if (room_ < rows * columns) held_ = Buffer<C>(room_ = rows * columns);
        for (int64_t r = 0; r < rows; r++) std::copy(half + r * ld, half + r * ld + columns, held_.get() + r * columns);
        is_held_ = true, is_skip_ = is_skip;
    }

    // The gradient at the layer's input, whole.
    void add(int64_t layer, const C *total, int64_t ld, int64_t rows, int64_t columns) {
        add_rows<C>(layer, total, ld, is_held_ ? held_.get() : nullptr, columns, is_skip_, rows, columns);
        is_held_ = false;
    }

    // [rows, columns] of T, with one of its halves or without.
    template <class T>
    void add_rows(int64_t layer, const T *total, int64_t ld, const T *half, int64_t ldhalf, bool is_skip, int64_t rows,
                  int64_t columns) {
        if (ld == columns && ldhalf == columns) columns *= rows, rows = 1;
        double *row = (*this)[layer];
        if constexpr (std::is_same_v<T, C>) {  // whole pieces as they lie
            for (; rows == 1 && unscale_ == C(1) && columns >= PIECE; columns -= PIECE) {
                add_piece(row, total, half, is_skip, PIECE);
                total += PIECE, half = half ? half + PIECE : nullptr;
            }
        }
        C *some = pieces_.get(), *halves = half ? some + ROOM : nullptr;
        for (int64_t r = 0, filled = 0; r < rows; r++)
            for (int64_t c = 0; c < columns;) {
                const int64_t count = std::min(PIECE - filled, columns - c);
                copy(total + r * ld + c, count, some + filled);
                if (half) copy(half + r * ldhalf + c, count, halves + filled);
                filled += count, c += count;
                if (filled < PIECE && (r + 1 < rows || c < columns)) continue;
                std::fill(some + filled, some + filled + LANES<C>, C(0));
                if (half) std::fill(halves + filled, halves + filled + LANES<C>, C(0));
                add_piece(row, some, halves, is_skip, std::exchange(filled, 0));
            }
        for (int e = low_; e <= high_; e++) {
            uint64_t found = std::exchange(single_[e], 0);
            for (uint16_t &lane : lanes_[e]) found += std::exchange(lane, uint16_t(0));
            row[recorded::OCTAVES + e] += double(found);
        }
        low_ = 255, high_ = 0, counted_ = 0;
    }

  private:
    template <class T>
    void copy(const T *from, int64_t count, C *to) const {
        for (int64_t i = 0; i < count; i++) to[i] = unscale_ * wide(from[i]);
    }

    // Up to PIECE numbers, and zeros up to a whole vector.
    void add_piece(double *row, const C *total, const C *half, bool is_skip, int64_t count) {
        using Lanes = typename Bits::Lanes;
        constexpr int W = LANES<C>;
        const int64_t padded = (count + W - 1) / W * W;

        // how large: exponents one by one, and the largest of all numbers, as integers, among which NaN is larger than all
        auto magnitudes = [](const C *from) { return reinterpret_cast<Lanes>(load(from)) & Bits::MAGNITUDE; };
        Lanes most = {};
        for (int64_t i = 0; i < padded; i += W) {
            const Lanes bits = magnitudes(total + i);
            Bits::store_octaves(octaves_ + i, bits >> Bits::MANTISSA);
            most = bits > most ? bits : most;
        }
        row[recorded::COUNT] += double(count);
        if (count_octaves(count))
            for (int64_t i = 0; i < count; i++) row[recorded::ZEROS] += total[i] == C(0);
        if (Bits::octave(largest_of(most)) == 255) {
            most = Lanes{};
            C *some = pieces_.get(), *halves = some + ROOM;
            for (int64_t i = 0; i < padded; i++) {
                const bool is_finite = i >= count || octaves_[i] != 255;
                some[i] = is_finite ? total[i] : C(0);
                if (half) halves[i] = is_finite ? half[i] : C(0);
            }
            total = some, half = half ? halves : nullptr;
            for (int64_t i = 0; i < padded; i += W) {
                const Lanes bits = magnitudes(total + i);
                most = bits > most ? bits : most;
            }
        }

        // sums, in the unit of the largest number; of halves that are much larger and cancel, in theirs
        const double largest = as_number(largest_of(most));
        row[recorded::LARGEST] = std::max(row[recorded::LARGEST], largest);
        if (add_sums(row, total, half, is_skip, padded, power_near<C>(largest), largest == 0, false)) return;
        Lanes most_half = {};
        for (int64_t i = 0; i < padded; i += W) {
            const Lanes bits = magnitudes(half + i);
            most_half = bits > most_half ? bits : most_half;
        }
        add_sums(row, total, half, is_skip, padded, power_near<C>(as_number(largest_of(most_half))), false, true);
    }

    // Whether it did: not, unless it is the last try, where halves are too large for the unit, or the total has given none.
    bool add_sums(double *row, const C *total, const C *half, bool is_skip, int64_t padded, double unit, bool has_no_unit,
                  bool is_last) {
        using Lanes = typename Bits::Lanes;
        constexpr int W = LANES<C>;
        const C inverse = C(1 / unit);
        Vector<C> sum = {}, squares = {}, first = {}, second = {}, product = {};
        for (int64_t i = 0; i < padded; i += W) {
            const Vector<C> value = load(total + i) * inverse;
            sum += reinterpret_cast<Vector<C>>(reinterpret_cast<Lanes>(value) & Bits::MAGNITUDE);
            squares += value * value;
            if (half) {
                const Vector<C> one = load(half + i) * inverse, other = value - one;
                first += one * one, second += other * other, product += one * other;
            }
        }
        auto total_of = [=](Vector<C> lanes) {
            double total = 0;
            for (int lane = 0; lane < W; lane++) total += double(lanes[lane]);
            return total;
        };
        if (half) {
            const double of_first = total_of(first), of_second = total_of(second), of_product = total_of(product);
            if (!is_last && (has_no_unit || !std::isfinite(of_first + of_second))) return false;
            row[is_skip ? recorded::SKIP : recorded::BRANCH] += unit * unit * of_first;
            row[is_skip ? recorded::BRANCH : recorded::SKIP] += unit * unit * of_second;
            row[recorded::PRODUCT] += unit * unit * of_product;
        }
        row[recorded::SUM] += unit * total_of(sum), row[recorded::SQUARES] += unit * unit * total_of(squares);
        return true;
    }

    // Whether an exponent is 0. They lie close together, so that each is looked for in turn, and found in bytes, whose pairs
    // are added up lane by lane; where they are many, they are counted one by one.
    bool count_octaves(int64_t count) {
        typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES), may_alias));
        typedef uint16_t Pairs __attribute__((vector_size(VECTOR_BYTES), may_alias));
        constexpr int64_t B = VECTOR_BYTES;
        static_assert(PIECE / B <= 255);
        const int64_t padded = (count + B - 1) / B * B;
        std::fill(octaves_ + count, octaves_ + padded, octaves_[0]);
        auto some = [&](int64_t i) { return *reinterpret_cast<const Bytes *>(octaves_ + i); };
        Bytes least = some(0), most = least;
        for (int64_t i = B; i < padded; i += B) {
            const Bytes here = some(i);
            least = here < least ? here : least, most = here > most ? here : most;
        }
        int low = 255, high = 0;
        for (int lane = 0; lane < B; lane++) low = std::min(low, int(least[lane])), high = std::max(high, int(most[lane]));
        low_ = std::min(low_, low), high_ = std::max(high_, high);
        if (high - low >= 40) {
            for (int64_t i = 0; i < count; i++) single_[octaves_[i]]++;
            return low == 0;
        }
        for (int e = low; e <= high; e++) {
            Bytes found = {};
            for (int64_t i = 0; i < padded; i += B) found -= reinterpret_cast<Bytes>(some(i) == uint8_t(e));
            const Pairs pairs = reinterpret_cast<Pairs>(found);
            Pairs &lanes = *reinterpret_cast<Pairs *>(lanes_[e]);
            lanes += (pairs & 255) + (pairs >> 8);
        }
        single_[octaves_[0]] -= uint64_t(padded - count);
        if (++counted_ == UINT16_MAX / (2 * (PIECE / B))) spill();  // for no more a lane has room
        return low == 0;
    }

    void spill() {
        counted_ = 0;
        for (int e = low_; e <= high_; e++)
            for (uint16_t &lane : lanes_[e]) single_[e] += std::exchange(lane, uint16_t(0));
    }

    static typename Bits::Integer largest_of(typename Bits::Lanes lanes) {
        typename Bits::Integer largest = 0;
        for (int lane = 0; lane < LANES<C>; lane++) largest = std::max(largest, typename Bits::Integer(lanes[lane]));
        return largest;
    }
    static double as_number(typename Bits::Integer bits) {
        C value;
        std::memcpy(&value, &bits, sizeof value);
        return double(value);
    }

    Buffer<double> rows_;
    C unscale_;
    Buffer<C> held_;
    int64_t room_ = 0;
    bool is_held_ = false, is_skip_ = false;
    Buffer<C> pieces_{2 * ROOM};
    alignas(64) uint8_t octaves_[PIECE + VECTOR_BYTES];
    alignas(64) uint16_t lanes_[256][VECTOR_BYTES / 2] = {};
    uint64_t single_[256] = {};
    int low_ = 255, high_ = 0, counted_ = 0;
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

// Adds to `row` what there is to record of `count` numbers, and of the half of them that came through the branch, if given.
template <class T>
void record_numbers(const void *total, const void *branch, int64_t count, double unscale, int threads, double *row) {
    using C = Compute<T>;
    constexpr int64_t WORTH_A_THREAD = 1 << 15;
    const int members = int(std::clamp<int64_t>(count / WORTH_A_THREAD, 1, threads));
    Records<C> records{size_t(members)};
    together(members, [&](const Team &team) {
        auto &mine = *(records[size_t(team.member)] = std::make_unique<Record<C>>(1, unscale));
        const auto [first, last] = team.share(count);
        const T *numbers = static_cast<const T *>(total) + first, *half = branch ? static_cast<const T *>(branch) + first : nullptr;
        mine.template add_rows<T>(0, numbers, last - first, half, last - first, false, 1, last - first);
    });
    add_records(records, 0, row);
}

}  // namespace fusedres
