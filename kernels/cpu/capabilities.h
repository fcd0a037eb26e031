// What this torch can do on this processor: the matrix products that oneDNN brings. It defines what product.h declares, so it
// is for the one source that reads torch's headers.
#pragma once

#include <ATen/Context.h>
#include <dlfcn.h>

#include "product.h"

namespace fusedres {

// Names as the compiler mangles them: a torch without one leaves null, and the engine its own products.
#define BRGEMM(A) reinterpret_cast<Brgemm>(dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas6brgemmEllllllbPK" A "Pfb"))
Brgemm brgemm_float = BRGEMM("fS3_");
Brgemm brgemm_bfloat16 = BRGEMM("N3c108BFloat16ES5_");
static void no_release(bool) {}
void (*brgemm_release)(bool) = [] {
    void *found = dlsym(RTLD_DEFAULT, "_ZN2at6native7cpublas14brgemm_releaseEb");
    return found ? reinterpret_cast<void (*)(bool)>(found) : no_release;
}();

namespace {

// Whether brgemm works here: torch raises where the processor, or oneDNN as it was built, does not have it.
bool works(Brgemm brgemm, bool is_vnni) {
    if (!brgemm) return false;
    try {
        float A[4] = {}, B[4] = {}, C[4] = {1, 1, 1, 1};
        brgemm(2, 2, 2, 2, 2, 2, false, A, B, C, is_vnni);
        brgemm_release(is_vnni);
        return C[0] == 0 && C[3] == 0;
    } catch (...) {
        return false;
    }
}

bool has_brgemm(at::ScalarType dtype) {
    if (!at::globalContext().userEnabledMkldnn()) return false;
    if (dtype == at::kFloat) {
        static const bool works_in_float = works(brgemm_float, false);
        return works_in_float;
    }
    if (dtype == at::kBFloat16) {
        static const bool works_in_bfloat16 = works(brgemm_bfloat16, true);
        return works_in_bfloat16;
    }
    return false;
}

}  // namespace
}  // namespace fusedres
