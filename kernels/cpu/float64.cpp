#include "engine.h"
#include "residual_loops.h"

template void fusedres::forward<double>(const Call &, void *, void *);
template void fusedres::backward<double>(const Call &, const void *, int64_t, const void *, void *, void *);
template int64_t fusedres::kept_bytes<double>(const Call &);
template void fusedres::record_numbers<double>(const std::vector<Recorded> &, double, int, double *);
template void fusedres::residual_forward<double>(const Residual &);
template void fusedres::residual_backward<double>(const Residual &);
