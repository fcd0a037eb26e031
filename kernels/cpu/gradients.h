// Gradients of parameters by thread, and their sum.
#pragma once

#include <memory>
#include <vector>

#include "panel.h"

namespace fusedres {

// One thread's gradients of all parameters, in C and double, until the threads' are added up in order. The first thread's
// matrices are the results themselves, where these are in C.
template <class T>
class Gradients {
    using C = Compute<T>;

  public:
    Gradients(const Call &call, bool has_matrices, bool is_first)
        : sums(size_t(call.depth)), dweight(size_t(call.depth)), dprojection(dweight) {
        const bool in_place = is_first && std::is_same_v<T, C>;
        int64_t matrices = 0, vectors = 0;
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            if (has_matrices && !in_place)
                matrices += layer.N * layer.K * ((layer.dweight != nullptr) + (layer.dprojection != nullptr));
            vectors += 3 * layer.N;
        }
        matrices_ = Buffer<C>(matrices);
        vectors_ = Buffer<double>(vectors);
        std::fill(vectors_.get(), vectors_.get() + vectors, 0.0);
        C *matrix = matrices_.get();
        double *vector = vectors_.get();
        for (int64_t l = 0; l < call.depth; l++) {
            const Layer &layer = call.layers[l];
            auto take_matrix = [&](void *wanted) {
                if (in_place && has_matrices) return static_cast<C *>(wanted);
                C *at = wanted && has_matrices ? matrix : nullptr;
                matrix += at ? layer.N * layer.K : 0;
                return at;
            };
            auto take_vector = [&](bool wanted) {
                double *at = wanted ? vector : nullptr;
                vector += layer.N;
                return at;
            };
            dweight[size_t(l)] = take_matrix(layer.dweight);
            dprojection[size_t(l)] = take_matrix(layer.dprojection);
            sums[size_t(l)].dbias = take_vector(layer.dbias);
            sums[size_t(l)].dprojection_bias = take_vector(layer.dprojection_bias);
            sums[size_t(l)].dchannel = take_vector(layer.dbranch_scale && layer.channel_scale);
        }
    }

    std::vector<Sums> sums;
    std::vector<C *> dweight, dprojection;
    bool is_empty = true;  // the matrices hold nothing yet

  private:
    Buffer<C> matrices_;
    Buffer<double> vectors_;
};

// to[i] = Σ of[t][i] over the team's threads t, in their order, for this member's share of i.
template <class T, class From, class Pick>
void add_up(const Team &team, int64_t count, void *to, const From &from, const Pick &pick) {
    if (!to || (team.members == 1 && static_cast<const void *>(pick(from[0])) == to)) return;
    Team::Share share = team.share(count);
    for (int64_t i = share.first; i < share.last; i++) {
        auto total = pick(from[0])[i];
        for (size_t t = 1; t < size_t(team.members); t++) total += pick(from[t])[i];
        static_cast<T *>(to)[i] = narrow<T>(Compute<T>(total));
    }
}

template <class T>
void write_gradients(const Team &team, const Call &call, const std::vector<std::unique_ptr<Gradients<T>>> &of) {
    using One = std::unique_ptr<Gradients<T>>;
    for (int64_t i = 0; i < call.depth; i++) {
        const Layer &layer = call.layers[i];
        const size_t l = size_t(i);
        add_up<T>(team, layer.N * layer.K, layer.dweight, of, [=](const One &g) { return g->dweight[l]; });
        add_up<T>(team, layer.N * layer.K, layer.dprojection, of, [=](const One &g) { return g->dprojection[l]; });
        add_up<T>(team, layer.N, layer.dbias, of, [=](const One &g) { return g->sums[l].dbias; });
        add_up<T>(team, layer.N, layer.dprojection_bias, of, [=](const One &g) { return g->sums[l].dprojection_bias; });
        if (layer.channel_scale)
            add_up<T>(team, layer.N, layer.dbranch_scale, of, [=](const One &g) { return g->sums[l].dchannel; });
        else
            add_up<T>(team, 1, layer.dbranch_scale, of, [=](const One &g) { return &g->sums[l].dbranch_scale; });
        add_up<T>(team, 1, layer.dskip_scale, of, [=](const One &g) { return &g->sums[l].dskip_scale; });
    }
}

}  // namespace fusedres
