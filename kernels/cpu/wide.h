// Vectors of what T computes in, out of numbers of type T.
#pragma once

#include <algorithm>

#include "number.h"
#include "vector.h"

namespace fusedres {

// W numbers from `from` on, widened; `count` of them where there are fewer, and zeros.
template <class T>
inline Vector<Compute<T>> load_wide(const T *from) {
    using C = Compute<T>;
    if constexpr (std::is_same_v<T, C>) {
        return load(from);
    } else {
        typedef uint16_t Bits __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
        typedef uint32_t WideBits __attribute__((vector_size(VECTOR_BYTES)));
        WideBits bits = __builtin_convertvector(*reinterpret_cast<const Bits *>(from), WideBits) << 16;
        return reinterpret_cast<Vector<C>>(bits);
    }
}
template <class T>
inline Vector<Compute<T>> load_some(const T *from, int64_t count) {
    Vector<Compute<T>> some = {};
    for (int64_t i = 0; i < count; i++) some[i] = wide(from[i]);
    return some;
}

// Rows of T in C, each followed by zeros from its end to the next.
template <class T>
void widen_rows(const T *from, int64_t ld, int64_t M, int64_t columns, Compute<T> *to, int64_t ldt) {
    for (int64_t m = 0; m < M; m++) {
        for (int64_t k = 0; k < columns; k++) to[m * ldt + k] = wide(from[m * ld + k]);
        std::fill(to + m * ldt + columns, to + (m + 1) * ldt, Compute<T>(0));
    }
}

}  // namespace fusedres
