// Number types: what T computes in, and how it is read and written.
#pragma once

#include <cstdint>
#include <cstring>

namespace fusedres {

struct bfloat16 {
    uint16_t bits;
};

template <class T>
struct ComputeOf {
    using type = T;
};
template <>
struct ComputeOf<bfloat16> {
    using type = float;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

inline float wide(float value) { return value; }
inline double wide(double value) { return value; }
inline float wide(bfloat16 value) {
    uint32_t bits = uint32_t(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

template <class T>
inline T narrow(Compute<T> value) {
    return value;
}
// To the nearest, ties to even; NaN stays NaN.
template <>
inline bfloat16 narrow<bfloat16>(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t(value != value ? 0x7fc0 : rounded)};
}

}  // namespace fusedres
