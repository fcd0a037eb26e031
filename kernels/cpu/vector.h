// Vectors as wide as the library is compiled for, by the compiler's own extension: no intrinsics, any architecture.
#pragma once

#include <cstdint>
#include <type_traits>

namespace fusedres {

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, MICRO_ROWS = 8, MICRO_VECTORS = 3;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, MICRO_ROWS = 6, MICRO_VECTORS = 2;
#else
constexpr int VECTOR_BYTES = 16, MICRO_ROWS = 6, MICRO_VECTORS = 2;
#endif

// Vectors of our own are aligned to their size, as clang takes those behind a reference to be; numbers in memory lie anywhere.
template <class C>
struct VectorOf {
    typedef C type __attribute__((vector_size(VECTOR_BYTES), may_alias));
    typedef C in_memory __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(C)), may_alias));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
constexpr int LANES = VECTOR_BYTES / sizeof(C);

template <class C>
inline Vector<C> load(const C *from) {
    return *reinterpret_cast<const typename VectorOf<C>::in_memory *>(from);
}
template <class C>
inline void store(C *to, Vector<C> value) {
    *reinterpret_cast<typename VectorOf<C>::in_memory *>(to) = value;
}

// The lanes of a and b in turn: of their lower halves (HIGH false), or of their upper halves.
template <class C, bool HIGH>
inline Vector<C> interleave(Vector<C> a, Vector<C> b) {
    using Index = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
    constexpr int W = LANES<C>;
    typedef Index Mask __attribute__((vector_size(VECTOR_BYTES)));
    Mask mask;
    for (int i = 0; i < W; i++) mask[i] = (HIGH ? W / 2 : 0) + i / 2 + (i % 2 ? W : 0);
#if defined(__clang__)
    Vector<C> mixed;
    for (int i = 0; i < W; i++) mixed[i] = mask[i] < W ? a[mask[i]] : b[mask[i] - W];
    return mixed;
#else
    return __builtin_shuffle(a, b, mask);
#endif
}

// Columns become rows, in place: log2(W) rounds in which row i meets row i + W/2.
template <class C>
inline void transpose_square(Vector<C> (&rows)[LANES<C>]) {
    constexpr int W = LANES<C>;
    for (int round = 1; round < W; round *= 2) {
        Vector<C> mixed[W];
        for (int i = 0; i < W / 2; i++) {
            mixed[2 * i] = interleave<C, false>(rows[i], rows[i + W / 2]);
            mixed[2 * i + 1] = interleave<C, true>(rows[i], rows[i + W / 2]);
        }
        for (int i = 0; i < W; i++) rows[i] = mixed[i];
    }
}

// The sum of each vector, in their order: halves are added while the others' are laid between them.
template <class C>
inline Vector<C> sums_of(Vector<C> (&vectors)[LANES<C>]) {
    for (int count = LANES<C> / 2; count > 0; count /= 2)
        for (int i = 0; i < count; i++)
            vectors[i] = interleave<C, false>(vectors[i], vectors[i + count]) +
                         interleave<C, true>(vectors[i], vectors[i + count]);
    return vectors[0];
}

}  // namespace fusedres
