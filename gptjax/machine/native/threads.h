// Work shared among the threads of XLA's own pool, and memory that each of them keeps.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace gptjax {

namespace ffi = xla::ffi;

constexpr int64_t kPatience = 10000;  // looks before a waiting thread makes room for others

inline int64_t Threads(const ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

// Calls `work(i)` once for each i in [0, count). The calling thread takes part and waits for nobody who has not begun,
// so that it does not matter whether the pool's other threads are busy, or wait here themselves.
template <typename Work>
void Parallel(ffi::ThreadPool& pool, int64_t count, Work&& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto shared = std::make_shared<Shared>();
  auto* function = &work;  // read only by those who found a number below `count`, for whom the caller waits
  auto take = [shared, function, count] {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      (*function)(i);
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min(Threads(pool), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    auto copy = take;
    pool.Schedule(std::move(copy));
  }
  take();
  for (int64_t looks = 0; shared->done.load(std::memory_order_acquire) < count; ++looks) {
    if (looks < kPatience)
      __builtin_ia32_pause();
    else
      std::this_thread::yield();  // who computes the last parts may wait for this processor
  }
}

// Room for `count` elements that belongs to this thread; each `Name` has its own, which is kept and may grow.
template <typename Name, typename T>
T* Scratch(int64_t count) {
  constexpr int64_t kLine = 64;
  thread_local std::vector<T> buffer;
  if (buffer.size() < static_cast<size_t>(count + kLine)) buffer.resize(count + kLine);
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + kLine - 1) & ~uintptr_t{kLine - 1});
}

}  // namespace gptjax
