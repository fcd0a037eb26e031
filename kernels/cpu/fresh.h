// Memory for the tensors that the engine hands out, out of the pool that takes it back when they go.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <atomic>
#include <new>
#include <utility>

#include "memory.h"

namespace fusedres {
namespace {

using Tensor = at::Tensor;

// Blocks of the pool, each beginning with its own size; the tensor's numbers follow.
class PooledMemory final : public c10::Allocator {
  public:
    static c10::Allocator *instance() {
        static PooledMemory *memory = new PooledMemory;  // never destroyed: tensors may outlive the library's statics
        return memory;
    }
    c10::DataPtr allocate(size_t bytes) override {
        int64_t taken = int64_t(bytes) + HEADER;
        char *block = static_cast<char *>(Pool::instance().take(&taken));
        *reinterpret_cast<int64_t *>(block) = taken;
        char *numbers = block + HEADER;
        c10::profiledCPUMemoryReporter().New(numbers, bytes);
        return {numbers, block, give_back, c10::Device(c10::kCPU)};
    }
    void copy_data(void *to, const void *from, size_t count) const override { default_copy_data(to, from, count); }

  private:
    static constexpr int64_t HEADER = 64;

    static void give_back(void *block) {
        c10::profiledCPUMemoryReporter().Delete(static_cast<char *>(block) + HEADER);
        Pool::instance().give(block, *static_cast<int64_t *>(block));
    }
};

inline bool torch_fills_fresh_memory() {
    const auto &context = at::globalContext();
    return context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
}

// at::empty without its dispatch, which costs more than a small layer; with it where torch fills fresh memory, as tests ask.
Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
    if (torch_fills_fresh_memory()) return at::empty(sizes, at::TensorOptions().dtype(dtype));
    int64_t bytes = int64_t(c10::elementSize(dtype));
    for (const int64_t size : sizes) bytes *= size;
    if (bytes < Pool::SMALLEST) return Tensor(at::detail::empty_cpu(sizes, dtype));
    constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
    return Tensor(at::detail::empty_generic(sizes, PooledMemory::instance(), keys, dtype, std::nullopt));
}

// One block for small tensors that come and go together, as a network's gradients do; the last one gives it back.
class Slab {
  public:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr int64_t LARGE = 0;  // none is small: past a tensor's end would be another's memory
#else
    static constexpr int64_t LARGE = 1 << 14;
#endif

    // Bytes that a tensor takes of a slab; 0 where it is to have memory of its own.
    static int64_t share(const Tensor &like) {
        const int64_t bytes = like.numel() * int64_t(like.element_size());
        return bytes < LARGE ? (bytes + 63) / 64 * 64 : 0;
    }

    explicit Slab(int64_t shares) {
        if (!shares) return;
        int64_t bytes = HEADER + shares;
        auto *block = static_cast<char *>(Pool::instance().take(&bytes));
        owners_ = new (block) Owners{1, bytes};
        next_ = block + HEADER;
    }
    Slab(const Slab &) = delete;
    ~Slab() {
        if (owners_) release(owners_);
    }
    Tensor take(const Tensor &like) {
        owners_->count.fetch_add(1, std::memory_order_relaxed);
        c10::DataPtr numbers(std::exchange(next_, next_ + share(like)), owners_, release, c10::Device(c10::kCPU));
        auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(),
                                                             size_t(like.numel()) * like.element_size(), std::move(numbers),
                                                             PooledMemory::instance(), true);
        Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(
            std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(like.scalar_type()));
        tensor.unsafeGetTensorImpl()->generic_set_sizes_contiguous(like.sizes());
        return tensor;
    }

  private:
    struct Owners {
        std::atomic<int64_t> count;
        int64_t bytes;
    };
    static constexpr int64_t HEADER = 64;

    static void release(void *owners_) {
        auto *owners = static_cast<Owners *>(owners_);
        if (owners->count.fetch_sub(1, std::memory_order_acq_rel) == 1) Pool::instance().give(owners, owners->bytes);
    }

    Owners *owners_ = nullptr;
    char *next_ = nullptr;
};

// to[i]: fresh memory like like[i], dense, where wanted.
inline void fresh_like(at::TensorList like, c10::ArrayRef<bool> wanted, Tensor *to) {
    const bool fills = torch_fills_fresh_memory();
    int64_t shares = 0;
    for (size_t i = 0; i < like.size() && !fills; i++) shares += wanted[i] ? Slab::share(like[i]) : 0;
    Slab slab(shares);
    for (size_t i = 0; i < like.size(); i++)
        if (wanted[i])
            to[i] = shares && Slab::share(like[i]) ? slab.take(like[i]) : fresh(like[i].sizes(), like[i].scalar_type());
}

}  // namespace
}  // namespace fusedres
