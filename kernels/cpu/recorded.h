// What stands where in a row of what is recorded of a gradient, as kernels/record.py has it.
#pragma once

#include <cstdint>

namespace fusedres {

namespace recorded {
enum Column : int64_t { COUNT, SUM, SQUARES, LARGEST, ZEROS, BRANCH, SKIP, PRODUCT, SCALE, OCTAVES = 16, COLUMNS = 272 };
}

}  // namespace fusedres
