// float32, and bfloat16, which computes in it: together, since most of their code is the same.
#include "derivatives.h"
#include "engine.h"

namespace fusedres {

template void forward<float>(const Call &, void *, void *);
template void backward<float>(const Call &, const void *, int64_t, const void *, void *, void *);
template int64_t kept_bytes<float>(const Call &);

template void forward<bfloat16>(const Call &, void *, void *);
template void backward<bfloat16>(const Call &, const void *, int64_t, const void *, void *, void *);
template int64_t kept_bytes<bfloat16>(const Call &);

}  // namespace fusedres
