// Threads of the OpenMP runtime that torch has already loaded, found by name: whatever compiles this library brings no
// second runtime. Without one the work runs on the calling thread.
#pragma once

#include <dlfcn.h>

#include <cstdint>

namespace fusedres {

namespace openmp {
using Parallel = void (*)(void (*)(void *), void *, unsigned, unsigned);
inline const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
inline const auto barrier = reinterpret_cast<void (*)()>(dlsym(RTLD_DEFAULT, "GOMP_barrier"));
inline const auto thread = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
inline const auto threads = reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
inline const bool is_there = parallel && barrier && thread && threads;
}  // namespace openmp

// Who works, out of how many. Each runs the same function; `wait` lets nobody on before all have come.
struct Team {
    int member, members;

    void wait() const {
        if (members > 1) openmp::barrier();
    }

    // This member's share of `count` pieces of work: [first, last).
    struct Share {
        int64_t first, last;
    };
    Share share(int64_t count) const { return {count * member / members, count * (member + 1) / members}; }
};

// work(team) on as many as `members` threads at once.
template <class Work>
void together(int members, const Work &work) {
    if (members <= 1 || !openmp::is_there) {
        work(Team{0, 1});
        return;
    }
    auto enter = [](void *argument) {
        (*static_cast<const Work *>(argument))(Team{openmp::thread(), openmp::threads()});
    };
    openmp::parallel(enter, const_cast<Work *>(&work), unsigned(members), 0);
}

}  // namespace fusedres
