// Divides work among the threads of XLA's pool, and gives each thread memory that later calls reuse.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <new>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace gptjax {

namespace ffi = xla::ffi;

constexpr int64_t kSpins = 10000;       // how often a waiting thread looks before it yields its core
constexpr int64_t kTasksPerThread = 4;  // so that no thread waits long for the last one

inline int64_t Threads(const ffi::ThreadPool& pool) { return std::max<int64_t>(1, pool.num_threads()); }

inline int64_t Ceil(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Returns into how many parts, at most `pieces`, to split each of `tasks` tasks, so that every thread gets a few parts.
// A split must not change how a number of the result is computed, or results would depend on the number of threads.
inline int64_t SplitsPerTask(const ffi::ThreadPool& pool, int64_t tasks, int64_t pieces) {
  return std::clamp<int64_t>(Ceil(kTasksPerThread * Threads(pool), std::max<int64_t>(1, tasks)), 1, pieces);
}

// Returns the number of rows in a task: `most`, or a smaller multiple of `unit`, so that every thread gets a task if
// there are enough rows.
inline int64_t RowsOfTask(const ffi::ThreadPool& pool, int64_t rows, int64_t most, int64_t unit) {
  return std::clamp<int64_t>(Ceil(Ceil(rows, 2 * Threads(pool)), unit) * unit, unit, most);
}

// Calls `work(i)` once for each i in [0, count). The calling thread works too and waits only for threads that have
// started, so busy or waiting threads of the pool cannot block it. If a call throws (out of memory), this function
// throws after all other calls have ended.
template <typename Work>
void Parallel(ffi::ThreadPool& pool, int64_t count, Work&& work) {
  struct Shared {
    std::atomic<int64_t> next{0}, done{0};
    std::atomic<bool> failed{false};
  };
  auto shared = std::make_shared<Shared>();
  auto* function = &work;  // read only by threads that got a number below `count`; the caller waits for these
  auto take = [shared, function, count]() noexcept {
    for (int64_t i; (i = shared->next.fetch_add(1)) < count;) {
      try {
        (*function)(i);
      } catch (...) {
        shared->failed.store(true, std::memory_order_relaxed);
      }
      shared->done.fetch_add(1, std::memory_order_release);
    }
  };
  int64_t helpers = std::min(Threads(pool), count) - 1;
  try {
    for (int64_t i = 0; i < helpers; ++i) {
      auto copy = take;
      pool.Schedule(std::move(copy));
    }
  } catch (const std::exception&) {  // out of memory or of threads: fewer threads do the work
  }
  take();
  for (int64_t spins = 0; shared->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < kSpins)
      __builtin_ia32_pause();
    else
      std::this_thread::yield();  // the thread that computes the last task may wait for this processor
  }
  if (shared->failed.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

// Returns memory of this thread for `count` elements, from one buffer for each `Name`. Later calls reuse the buffer. It
// grows if necessary, and a call that needs far less replaces it by a smaller one.
template <typename Name, typename T>
T* Scratch(int64_t count) {
  constexpr size_t kLine = 64 / sizeof(T), kSmall = (size_t{1} << 20) / sizeof(T), kFarLess = 8;
  thread_local std::vector<T> buffer;
  const size_t needed = static_cast<size_t>(count) + kLine;
  if (buffer.size() > kSmall && needed < buffer.size() / kFarLess) std::vector<T>().swap(buffer);
  if (buffer.size() < needed) {
    buffer.clear();  // so that nothing is copied
    buffer.resize(needed);
  }
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~uintptr_t{63});
}

// Calls `kernel` and returns exceptions as errors, because XLA's code does not handle exceptions.
template <auto kernel>
struct Guarded;
template <typename... Args, ffi::Error (*kernel)(Args...)>
struct Guarded<kernel> {
  static ffi::Error Call(Args... args) {
    try {
      return kernel(std::move(args)...);
    } catch (const std::bad_alloc&) {
      return ffi::Error(ffi::ErrorCode::kResourceExhausted, "not enough memory for a kernel");
    }
  }
};

}  // namespace gptjax
