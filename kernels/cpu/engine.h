// The engine for one T: each call goes its way. Included by one source file per T.
#pragma once

#include "dots.h"
#include "lanes_backward.h"
#include "layers.h"

namespace fusedres {

template <class T>
void forward(const Call &call, void *y_, void *kept) {
    T *y = static_cast<T *>(y_);
    switch (call.way) {
        case Way::lanes: return forward_lanes<T>(call, y, static_cast<Compute<T> *>(kept));
        case Way::dots: return forward_dots<T>(call, y, static_cast<T *>(kept));
        case Way::blocks: return forward_blocks<T>(call, y, static_cast<T *>(kept));
        case Way::layers: return forward_layers<T>(call, y, static_cast<T *>(kept));
    }
}

template <class T>
void backward(const Call &call, const void *g_, int64_t ldg, const void *kept_, void *dx_, void *dresidual_) {
    const T *g = static_cast<const T *>(g_), *kept = static_cast<const T *>(kept_);
    T *dx = static_cast<T *>(dx_), *dresidual = static_cast<T *>(dresidual_);
    switch (call.way) {
        case Way::lanes:
            return backward_lanes<T>(call, g, ldg, static_cast<const Compute<T> *>(kept_), dx, dresidual);
        case Way::dots: return backward_dots<T>(call, g, ldg, kept, dx, dresidual);
        case Way::blocks: return backward_blocks<T>(call, g, ldg, kept, dx, dresidual);
        case Way::layers: return backward_layers<T>(call, g, ldg, kept, dx, dresidual);
    }
}

template <class T>
int64_t kept_bytes(const Call &call) {
    using C = Compute<T>;
    switch (call.way) {
        case Way::lanes:
            return KeptLayout<C>(call).row_elements() * rounded_up(call.M, lane_rows<C>(call)) * int64_t(sizeof(C));
        case Way::dots: return KeptLayout<T>(call).row_elements() * call.M * int64_t(sizeof(T));
        default: return KeptLayout<T>(call).row_elements() * rounded_up(call.M, GRAIN) * int64_t(sizeof(T));
    }
}

}  // namespace fusedres
