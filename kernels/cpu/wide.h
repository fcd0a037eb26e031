// Vectors of what T computes in, out of numbers of type T.
#pragma once

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

}  // namespace fusedres
