#include "engine.h"

template void fusedres::forward<float>(const Call &, void *, void *);
template void fusedres::backward<float>(const Call &, const void *, int64_t, const void *, void *, void *);
template int64_t fusedres::kept_bytes<float>(const Call &);
