#include "engine.h"

template void fusedres::forward<double>(const Call &, void *, void *);
template void fusedres::backward<double>(const Call &, const void *, int64_t, const void *, void *, void *);
template int64_t fusedres::kept_bytes<double>(const Call &);
