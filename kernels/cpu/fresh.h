// Memory for the tensors that the engine hands out, out of the pool that takes it back when they go.
#pragma once

#include <ATen/Context.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

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

// at::empty without its dispatch, which costs more than a small layer; with it where torch fills fresh memory, as tests ask.
Tensor fresh(at::IntArrayRef sizes, at::ScalarType dtype) {
    const auto &context = at::globalContext();
    if (context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory())
        return at::empty(sizes, at::TensorOptions().dtype(dtype));
    int64_t bytes = int64_t(c10::elementSize(dtype));
    for (const int64_t size : sizes) bytes *= size;
    if (bytes < Pool::SMALLEST) return Tensor(at::detail::empty_cpu(sizes, dtype));
    constexpr c10::DispatchKeySet keys(c10::DispatchKey::CPU);
    return Tensor(at::detail::empty_generic(sizes, PooledMemory::instance(), keys, dtype, std::nullopt));
}

}  // namespace
}  // namespace fusedres
