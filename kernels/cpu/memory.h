// Memory for one call: aligned to cache lines, in huge pages where it is large, and kept for the next call where it is not too
// much, because fresh pages cost more than what is done to them.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace fusedres {

// Asks for pages of 2 MiB where memory spans some: fresh memory then costs hundreds of times fewer page faults.
inline void in_huge_pages(void *memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = uintptr_t(1) << 21;
    const uintptr_t begin = uintptr_t(memory), first = (begin + PAGE - 1) / PAGE * PAGE;
    const uintptr_t last = (begin + uintptr_t(bytes)) / PAGE * PAGE;
    if (last > first) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Blocks that calls and tensors have given back, the latest last; whoever needs one of about that size takes it. A step of
// training asks for the same blocks again and again, and fresh pages are cleared first, on virtual machines twice. What is
// over `most()` goes back to the system, what has waited longest first.
class Pool {
  public:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr int64_t SMALLEST = INT64_MAX;  // none: past the end of a block's use its memory would still be a block's
#else
    static constexpr int64_t SMALLEST = int64_t(1) << 16;
#endif

    // An eighth of the machine's memory.
    static int64_t most() {
        static const int64_t most = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 8;
        return most;
    }

    static Pool &instance() {
        static Pool *pool = new Pool;  // never destroyed: threads may outlive the library's statics
        return *pool;
    }

    void *take(int64_t *bytes) {
        if (*bytes >= SMALLEST) {
            std::lock_guard<std::mutex> lock(mutex_);
            for (size_t i = blocks_.size(); i-- > 0;) {  // the last one given may still be in a cache
                const Block found = blocks_[i];
                if (found.bytes < *bytes || found.bytes > *bytes + *bytes / 4) continue;
                blocks_.erase(blocks_.begin() + int64_t(i));
                total_ -= found.bytes;
                *bytes = found.bytes;
                return found.memory;
            }
        }
        void *memory = std::aligned_alloc(64, size_t(*bytes));
        if (!memory) throw std::bad_alloc();
        in_huge_pages(memory, *bytes);
        return memory;
    }

    void give(void *memory, int64_t bytes) {
        if (bytes < SMALLEST || bytes > most()) return std::free(memory);
        std::lock_guard<std::mutex> lock(mutex_);
        total_ += bytes;
        blocks_.push_back({memory, bytes});
        size_t old = 0;
        for (; total_ > most(); old++) {
            total_ -= blocks_[old].bytes;
            std::free(blocks_[old].memory);
        }
        blocks_.erase(blocks_.begin(), blocks_.begin() + int64_t(old));
    }

  private:
    struct Block {
        void *memory;
        int64_t bytes;
    };
    std::mutex mutex_;
    std::vector<Block> blocks_;
    int64_t total_ = 0;
};

// What a thread's last small blocks were, for its next ones: a network of one row takes less time than its allocations.
class SmallBlocks {
  public:
#if defined(__SANITIZE_ADDRESS__)
    static constexpr int64_t BYTES = 0;  // none, as in the pool
#else
    static constexpr int64_t BYTES = 16384;
#endif

    static SmallBlocks &mine() {
        static thread_local SmallBlocks blocks;
        return blocks;
    }
    ~SmallBlocks() {
        while (count_) std::free(blocks_[--count_]);
    }
    void *take() {
        if (count_) return blocks_[--count_];
        void *memory = std::aligned_alloc(64, BYTES);
        if (!memory) throw std::bad_alloc();
        return memory;
    }
    void give(void *memory) {
        if (count_ < MOST)
            blocks_[count_++] = memory;
        else
            std::free(memory);
    }

  private:
    static constexpr int MOST = 8;
    void *blocks_[MOST];
    int count_ = 0;
};

template <class E>
class Buffer {
  public:
    explicit Buffer(int64_t count = 0) : bytes_((count * int64_t(sizeof(E)) + 63) / 64 * 64) {
        if (!count) return;
        memory_ = static_cast<E *>(is_small() ? SmallBlocks::mine().take() : Pool::instance().take(&bytes_));
    }
    Buffer(Buffer &&other) noexcept { *this = std::move(other); }
    Buffer &operator=(Buffer &&other) noexcept {
        std::swap(memory_, other.memory_), std::swap(bytes_, other.bytes_);
        return *this;
    }
    ~Buffer() {
        if (!memory_) return;
        if (is_small())
            SmallBlocks::mine().give(memory_);
        else
            Pool::instance().give(memory_, bytes_);
    }
    E *get() const { return memory_; }
    E &operator[](int64_t i) const { return memory_[i]; }

  private:
    bool is_small() const { return bytes_ <= SmallBlocks::BYTES; }

    E *memory_ = nullptr;
    int64_t bytes_ = 0;
};

}  // namespace fusedres
