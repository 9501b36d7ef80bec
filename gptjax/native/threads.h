// Work shared among the threads of XLA's own pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace gptjax {

namespace ffi = xla::ffi;

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
  int64_t helpers = std::min<int64_t>(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    auto copy = take;
    pool.Schedule(std::move(copy));
  }
  take();
  while (shared->done.load(std::memory_order_acquire) < count) __builtin_ia32_pause();
}

}  // namespace gptjax
