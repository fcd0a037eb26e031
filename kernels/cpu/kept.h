// What forward leaves in memory for backward to read.
#pragma once

#include <cstdint>

#include "memory.h"
#include "network.h"
#include "product.h"

namespace fusedres {

// Where a layer's arrays lie in the kept memory, in elements per row before them; -1 where there is none.
struct Slots {
    int64_t input = -1, slope = -1, branch = -1, skip = -1;
};

template <class T>
class KeptLayout {
  public:
    explicit KeptLayout(const Call &call) : slots_(call.depth) {
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            Slots &slots = slots_[l] = {};
            if (l > 0) slots.input = take(layer.K);
            if (layer.activation != Activation::none) slots.slope = take(layer.N);
            if (layer.keeps_branch) slots.branch = take(layer.N);
            if (layer.keeps_skip && layer.skip == Skip::projection) slots.skip = take(layer.N);
        }
    }
    const Slots &operator[](int64_t l) const { return slots_[l]; }
    int64_t row_elements() const { return total_; }

  private:
    int64_t take(int64_t columns) {
        int64_t at = total_;
        total_ += even<T>(columns);
        return at;
    }
    Buffer<Slots> slots_;
    int64_t total_ = 0;
};

}  // namespace fusedres
