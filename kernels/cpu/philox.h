// Stochastic depth: the first word of Philox4x32-10 (Salmon et al., 2011) with the row's index as its counter, as
// `fusedres/philox.py` and `kernels/triton/philox.py` compute it.
#pragma once

#include <cstdint>

#include "network.h"

namespace fusedres {

inline uint32_t philox(uint64_t seed, uint64_t row) {
    uint32_t c0 = uint32_t(row), c1 = uint32_t(row >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t low = uint64_t(c0) * 0xD2511F53u, high = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(high >> 32) ^ c1 ^ k0;
        c1 = uint32_t(high);
        c2 = uint32_t(low >> 32) ^ c3 ^ k1;
        c3 = uint32_t(low);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return c0;
}

inline bool is_kept(uint64_t seed, uint64_t drop_threshold, int64_t row) {
    return !drop_threshold || philox(seed, uint64_t(row)) >= drop_threshold;
}
inline bool is_kept(const Layer &layer, int64_t row) { return is_kept(layer.seed, layer.drop_threshold, row); }

}  // namespace fusedres
