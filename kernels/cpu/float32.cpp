// float32, and bfloat16, which computes in it: together, since most of their code is the same.
#include "derivatives.h"
#include "engine.h"
#include "residual_loops.h"

namespace fusedres {

template void forward<float>(const Call &, void *, void *);
template void backward<float>(const Call &, const void *, int64_t, const void *, void *, void *);
template int64_t kept_bytes<float>(const Call &);
template void record_numbers<float>(const std::vector<Recorded> &, double, int, double *);

template void forward<bfloat16>(const Call &, void *, void *);
template void backward<bfloat16>(const Call &, const void *, int64_t, const void *, void *, void *);
template int64_t kept_bytes<bfloat16>(const Call &);
template void record_numbers<bfloat16>(const std::vector<Recorded> &, double, int, double *);

template void residual_forward<float>(const Residual &);
template void residual_backward<float>(const Residual &);
template void residual_forward<bfloat16>(const Residual &);
template void residual_backward<bfloat16>(const Residual &);

}  // namespace fusedres
