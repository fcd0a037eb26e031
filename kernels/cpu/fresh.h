// Memory for the tensors that the engine hands out, out of the pool that takes it back when they go.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

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

// to[i]: fresh memory like like[i], dense, where wanted. Small ones lie in one block, which goes with the last of them: a
// network's gradients come and go together.
inline void fresh_like(at::TensorList like, c10::ArrayRef<bool> wanted, Tensor *to) {
#if defined(__SANITIZE_ADDRESS__)
    constexpr int64_t LARGE = 0;  // none is small: past a tensor's end would be another's memory
#else
    constexpr int64_t LARGE = 1 << 14;
#endif
    const bool fills = torch_fills_fresh_memory();
    auto bytes_of = [](const Tensor &tensor) { return tensor.numel() * int64_t(tensor.element_size()); };
    auto share = [&](const Tensor &tensor) {  // of the block; 0 for memory of its own
        const int64_t bytes = bytes_of(tensor);
        return fills || bytes >= LARGE ? 0 : (bytes + 63) / 64 * 64;
    };
    int64_t shares = 0;
    for (size_t i = 0; i < like.size(); i++) shares += wanted[i] ? share(like[i]) : 0;
    const Tensor block = shares ? fresh({shares}, at::kByte) : Tensor();
    char *next = shares ? static_cast<char *>(block.mutable_data_ptr()) : nullptr;
    for (size_t i = 0; i < like.size(); i++) {
        if (!wanted[i]) continue;
        if (!share(like[i])) {
            to[i] = fresh(like[i].sizes(), like[i].scalar_type());
            continue;
        }
        using Owner = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
        c10::DataPtr numbers(next, Tensor(block).unsafeReleaseTensorImpl(),
                             [](void *owner) { Owner::reclaim(static_cast<c10::TensorImpl *>(owner)); },
                             c10::Device(c10::kCPU));
        next += share(like[i]);
        auto storage = c10::make_intrusive<c10::StorageImpl>(c10::StorageImpl::use_byte_size_t(), size_t(bytes_of(like[i])),
                                                             std::move(numbers), PooledMemory::instance(), true);
        to[i] = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                         c10::scalarTypeToTypeMeta(like[i].scalar_type()));
        to[i].unsafeGetTensorImpl()->generic_set_sizes_contiguous(like[i].sizes());
    }
}

}  // namespace
}  // namespace fusedres
