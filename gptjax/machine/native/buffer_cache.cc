// A cache of large buffers: a library that is loaded before the C library (LD_PRELOAD).
//
// XLA allocates a step's temporary buffer with `posix_memalign` and frees it at the end of the step. glibc returns such
// a large buffer to the kernel. For the next step the kernel clears its pages again, or gets them again from the host
// of a virtual machine. This library caches a freed buffer for the next request of its size. A request for a different
// size frees every cached buffer. A buffer that was not requested for a long time is freed too, so that a process does
// not hold more memory than it uses at the same time.
//
// There are no locks: a slot belongs to the thread that changed its state. So after a fork nothing is locked.

#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

extern "C" {
void __libc_free(void*);
void* __libc_memalign(size_t, size_t);
void* __libc_realloc(void*, size_t);
}

namespace {

constexpr size_t kLarge = size_t{32} << 20;  // bytes; glibc caches smaller buffers
constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kSlots = 256;
constexpr int kMostPassedOver = 64;  // a cached buffer is freed after so many requests that other buffers served
// A request that finds no cached buffer waits up to 5 ms for one of its size that is in use: XLA frees a step's buffer
// a moment after it returned the step's results, when the next step has already begun.
constexpr int kAttempts = 50;
constexpr timespec kPause{0, 100'000};  // between two attempts

enum State { kEmpty, kChanging, kUsed, kCached };

struct Slot {
  std::atomic<int> state{kEmpty};
  std::atomic<char*> at{nullptr};
  std::atomic<size_t> size{0};  // a thread that reads an old value makes one attempt more or less
  int passed_over = 0;
  int change = 0;  // `changes` when the buffer was taken

  bool Change(State from, State to) {
    int expected = from;
    return state.load(std::memory_order_relaxed) == from &&
           state.compare_exchange_strong(expected, to, std::memory_order_acq_rel);
  }
  void Set(State to) { state.store(to, std::memory_order_release); }
};

Slot slots[kSlots];
std::atomic<size_t> cached{0};
std::atomic<int> changes{0};  // how often the requested size has changed
size_t most_cached = 0;

__attribute__((constructor)) void ReadLimit() {
  if (const char* text = getenv("GPTJAX_BUFFER_CACHE_BYTES")) most_cached = strtoull(text, nullptr, 10);
}

char* MapHugePages(size_t size) {
  void* all = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(all);
  size_t before = -reinterpret_cast<uintptr_t>(begin) % kHugePage;
  if (before) munmap(begin, before);
  munmap(begin + before + size, kHugePage - before);
  madvise(begin + before, size, MADV_HUGEPAGE);
  return begin + before;
}

// Frees the buffer of a slot whose state is kChanging.
void Unmap(Slot& slot) {
  munmap(slot.at.exchange(nullptr), slot.size);
  slot.Set(kEmpty);
}

bool Fits(const Slot& slot, size_t size) { return slot.size >= size && slot.size <= size + size / 8; }

// Takes a cached buffer of the size, if there is one; frees those that were passed over too often.
void* TakeCached(size_t size) {
  Slot* found = nullptr;
  for (Slot& slot : slots) {
    if (!slot.Change(kCached, kChanging)) continue;
    if (!found && Fits(slot, size)) {
      found = &slot;
      continue;
    }
    if (!found || ++slot.passed_over <= kMostPassedOver) {
      slot.Set(kCached);
    } else {
      cached -= slot.size;
      Unmap(slot);
    }
  }
  if (!found) return nullptr;
  cached -= found->size;
  found->passed_over = 0;
  found->change = changes;
  void* at = found->at;
  found->Set(kUsed);
  return at;
}

bool IsInUse(size_t size) {
  for (Slot& slot : slots)
    if (slot.state.load(std::memory_order_acquire) == kUsed && Fits(slot, size)) return true;
  return false;
}

void* Take(size_t size) {
  size = (size + kHugePage - 1) / kHugePage * kHugePage;
  if (void* at = TakeCached(size)) return at;
  for (int attempt = 0; attempt < kAttempts && IsInUse(size); ++attempt) {
    nanosleep(&kPause, nullptr);
    if (void* at = TakeCached(size)) return at;
  }
  for (Slot& slot : slots)
    if (slot.Change(kCached, kChanging)) {
      cached -= slot.size;
      Unmap(slot);
    }
  if (!IsInUse(size)) ++changes;
  for (Slot& slot : slots) {
    if (!slot.Change(kEmpty, kChanging)) continue;
    char* at = MapHugePages(size);
    slot.size = size;
    slot.passed_over = 0;
    slot.change = changes;
    slot.at = at;
    slot.Set(at ? kUsed : kEmpty);
    return at;
  }
  return nullptr;
}

// The slot of a buffer that is in use, or null.
Slot* Find(void* at) {
  if (!at || reinterpret_cast<uintptr_t>(at) % kHugePage) return nullptr;
  for (Slot& slot : slots)
    if (slot.at.load(std::memory_order_acquire) == at) return &slot;
  return nullptr;
}

void Return(Slot& slot) {
  const int error = errno;
  if (!slot.Change(kUsed, kChanging)) abort();  // freed twice
  if (slot.change != changes || cached + slot.size > most_cached) {
    Unmap(slot);
  } else {
    cached += slot.size;
    slot.Set(kCached);
  }
  errno = error;
}

}  // namespace

extern "C" {

size_t gptjax_cached_bytes() { return cached; }

int posix_memalign(void** to, size_t alignment, size_t size) {
  const bool valid = alignment >= sizeof(void*) && (alignment & (alignment - 1)) == 0;
  if (!valid) return EINVAL;
  void* at = size >= kLarge && size < SIZE_MAX / 2 && alignment <= kHugePage ? Take(size) : nullptr;
  if (!at) at = __libc_memalign(alignment, size);
  if (!at) return ENOMEM;
  *to = at;
  return 0;
}

void free(void* at) {
  if (Slot* slot = Find(at)) return Return(*slot);
  __libc_free(at);
}

void* realloc(void* at, size_t size) {
  Slot* slot = Find(at);
  if (!slot) return __libc_realloc(at, size);
  void* to = size ? __libc_realloc(nullptr, size) : nullptr;
  if (to) memcpy(to, at, std::min<size_t>(size, slot->size));
  if (to || !size) Return(*slot);
  return to;
}

size_t malloc_usable_size(void* at) {
  if (Slot* slot = Find(at)) return slot->size;
  using Function = size_t (*)(void*);
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, "malloc_usable_size"))(at);
}
}
