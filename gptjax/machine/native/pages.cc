// Keeps the pages of large buffers from one step to the next: to be loaded before the C library (LD_PRELOAD).
//
// XLA asks `posix_memalign` for a step's temporary buffer and frees it at the step's end. The C library gives so large a
// buffer back to the kernel, which clears its pages for the next step, or fetches them from the host of a virtual
// machine again. Here it is kept for the next one that asks for as much. One that asks for another size lets go of all
// that is kept or will be given back, and one that was not asked for in a long time goes too, so that a process does not
// hold more than it uses at the same time.
//
// No locks: a slot belongs to whoever changed its state, so a process that forks in between finds nothing locked.

#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

extern "C" {
void __libc_free(void*);
void* __libc_memalign(size_t, size_t);
void* __libc_realloc(void*, size_t);
}

namespace {

constexpr size_t kLarge = size_t{32} << 20;  // glibc itself keeps what is smaller
constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kSlots = 256;
constexpr int kMostPassedOver = 64;     // times that another buffer of the size was taken
constexpr int kLooks = 50;              // for one that is about to be given back
constexpr timespec kPause{0, 100'000};  // between them

enum State { kEmpty, kChanging, kUsed, kKept };

struct Slot {
  std::atomic<int> state{kEmpty};
  std::atomic<char*> at{nullptr};
  size_t size = 0;
  int passed_over = 0;
  int change = 0;  // how often the size had changed when it was taken

  bool Change(State from, State to) {
    int expected = from;
    return state.load(std::memory_order_relaxed) == from &&
           state.compare_exchange_strong(expected, to, std::memory_order_acq_rel);
  }
  void Set(State to) { state.store(to, std::memory_order_release); }
};

Slot slots[kSlots];
std::atomic<size_t> kept{0};
std::atomic<int> changes{0};  // of the size that is asked for
size_t most_kept = 0;

__attribute__((constructor)) void ReadLimit() {
  if (const char* text = getenv("GPTJAX_KEPT_BYTES")) most_kept = strtoull(text, nullptr, 10);
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

void Unmap(Slot& slot) {  // one that is `kChanging`
  munmap(slot.at.exchange(nullptr), slot.size);
  slot.Set(kEmpty);
}

bool Fits(const Slot& slot, size_t size) { return slot.size >= size && slot.size <= size + size / 8; }

// A kept buffer of the size, if there is one; the others wait for their turn, or have waited too long.
void* TakeKept(size_t size) {
  Slot* found = nullptr;
  for (Slot& slot : slots) {
    if (!slot.Change(kKept, kChanging)) continue;
    if (!found && Fits(slot, size)) {
      found = &slot;
      continue;
    }
    if (!found || ++slot.passed_over <= kMostPassedOver) {
      slot.Set(kKept);
    } else {
      kept -= slot.size;
      Unmap(slot);
    }
  }
  if (!found) return nullptr;
  kept -= found->size;
  found->passed_over = 0;
  found->change = changes;
  void* at = found->at;
  found->Set(kUsed);
  return at;
}

bool SomeAreUsed(size_t size) {
  for (Slot& slot : slots)
    if (slot.state.load(std::memory_order_acquire) == kUsed && Fits(slot, size)) return true;
  return false;
}

void* Take(size_t size) {
  size = (size + kHugePage - 1) / kHugePage * kHugePage;
  if (void* at = TakeKept(size)) return at;
  // XLA gives a step's buffer back a moment after the step's results, while the next step begins already.
  for (int look = 0; look < kLooks && SomeAreUsed(size); ++look) {
    nanosleep(&kPause, nullptr);
    if (void* at = TakeKept(size)) return at;
  }
  for (Slot& slot : slots)
    if (slot.Change(kKept, kChanging)) {
      kept -= slot.size;
      Unmap(slot);
    }
  if (!SomeAreUsed(size)) ++changes;
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

// The slot of a buffer that is in use, or none.
Slot* Find(void* at) {
  if (!at || reinterpret_cast<uintptr_t>(at) % kHugePage) return nullptr;
  for (Slot& slot : slots)
    if (slot.at.load(std::memory_order_acquire) == at) return &slot;
  return nullptr;
}

void Give(Slot& slot) {
  const int error = errno;
  if (!slot.Change(kUsed, kChanging)) abort();  // freed twice
  if (slot.change != changes || kept + slot.size > most_kept) {
    Unmap(slot);
  } else {
    kept += slot.size;
    slot.Set(kKept);
  }
  errno = error;
}

}  // namespace

extern "C" {

size_t gptjax_kept_bytes() { return kept; }

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
  if (Slot* slot = Find(at)) return Give(*slot);
  __libc_free(at);
}

void* realloc(void* at, size_t size) {
  Slot* slot = Find(at);
  if (!slot) return __libc_realloc(at, size);
  void* to = size ? __libc_realloc(nullptr, size) : nullptr;
  if (to) memcpy(to, at, size < slot->size ? size : slot->size);
  if (to || !size) Give(*slot);
  return to;
}

size_t malloc_usable_size(void* at) {
  if (Slot* slot = Find(at)) return slot->size;
  using Function = size_t (*)(void*);
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, "malloc_usable_size"))(at);
}
}
