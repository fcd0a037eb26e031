// How many numbers have which exponent: each becomes a word with one bit, and these are added up bit by bit in carry-save
// adders, a positional population count (Klarqvist, Muła and Lemire 2019, arXiv:1911.02696).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vector.h"

namespace fusedres {

// A number's bits, without its sign.
template <class C>
struct BitsOf {
    using Integer = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
    using Word = std::make_unsigned_t<Integer>;
    typedef Integer Lanes __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef Word Words __attribute__((vector_size(VECTOR_BYTES), may_alias));
    static constexpr int MANTISSA = sizeof(C) == 4 ? 23 : 52, BIAS = sizeof(C) == 4 ? 127 : 1023, NOT_FINITE = 2 * BIAS + 1;
    static constexpr Integer MAGNITUDE = Integer(~Word(0) >> 1);

    static Integer magnitude(C value) {
        Integer bits;
        std::memcpy(&bits, &value, sizeof bits);
        return bits & MAGNITUDE;
    }
    static C number(Integer bits) {
        C value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    static int exponent(Integer magnitude) { return int(magnitude >> MANTISSA) - BIAS; }
};

// Of up to MOST vectors of numbers below 2, by groups of four. BINS exponents have a bin each, that of 1 to 2 the last; smaller
// numbers are all in the first.
template <class C>
class Tally {
    using Bits = BitsOf<C>;
    using Lanes = typename Bits::Lanes;
    using Words = typename Bits::Words;
    using Word = typename Bits::Word;

  public:
    static constexpr int BINS = 8 * sizeof(C), MOST = 252;
    static constexpr C SMALL = C(2) / C(Word(1) << (BINS - 1));  // where the second bin begins

    // The magnitudes of four vectors.
    void add(Lanes a, Lanes b, Lanes c, Lanes d) {
        Words first, second, carry;
        add_two(planes_[0], bit_of(a), bit_of(b), first);
        add_two(planes_[0], bit_of(c), bit_of(d), second);
        add_two(planes_[1], first, second, carry);
        for (int plane = 2; plane < 8; plane++) {
            const Words next = planes_[plane] & carry;
            planes_[plane] ^= carry, carry = next;
        }
    }

    // counts [BINS]: of all that were added.
    void read(uint32_t *counts) const {
        constexpr Word BYTES = ~Word(0) / 255, PAIRS = ~Word(0) / 65535;
        for (int bit = 0; bit < 8; bit++) {
            Words bytes = {};  // the bins bit, bit + 8, … of each lane
            for (int plane = 0; plane < 8; plane++) bytes += ((planes_[plane] >> bit) & BYTES) << plane;
            Words even = bytes & (PAIRS * 255), odd = (bytes >> 8) & (PAIRS * 255);
            Word of_even = 0, of_odd = 0;  // lanes together: 16 of up to 252 fit
            for (int lane = 0; lane < LANES<C>; lane++) of_even += even[lane], of_odd += odd[lane];
            for (int bin = bit; bin < BINS; bin += 16, of_even >>= 16, of_odd >>= 16)
                counts[bin] = uint32_t(of_even & 65535), counts[bin + 8] = uint32_t(of_odd & 65535);
        }
    }

  private:
    static Words bit_of(Lanes magnitudes) {
        const Lanes zero = {}, least = zero + (typename Bits::Integer(Bits::BIAS - BINS + 1) << Bits::MANTISSA);
        const Lanes inside = magnitudes > least ? magnitudes : least;
        const Words one = Words{} + 1;
        return one << (reinterpret_cast<Words>(inside >> Bits::MANTISSA) & (BINS - 1));  // BIAS + 1 is a multiple of BINS
    }
    // sum + a + b, bit by bit, is sum and twice carry.
    static void add_two(Words &sum, Words a, Words b, Words &carry) {
        const Words either = sum ^ a;
        carry = (sum & a) | (either & b);
        sum = either ^ b;
    }

    Words planes_[8] = {};
};

}  // namespace fusedres
