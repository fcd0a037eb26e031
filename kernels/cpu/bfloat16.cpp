#include "engine.h"

template void fusedres::forward<fusedres::bfloat16>(const Call &, void *, void *);
template void fusedres::backward<fusedres::bfloat16>(const Call &, const void *, int64_t, const void *, void *, void *);
template int64_t fusedres::kept_bytes<fusedres::bfloat16>(const Call &);
