// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Work in parts on a pool that may be busy with its caller.

#ifndef GEMMA_EXT_KERNELS_CPU_PARALLEL_H_
#define GEMMA_EXT_KERNELS_CPU_PARALLEL_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gemma_ext {

// Parts of one phase after those of another. The caller takes parts like every
// helper and so never waits for a helper that did not start: on a pool whose
// threads are all taken, it does everything itself.
class Job : public std::enable_shared_from_this<Job> {
 public:
  // `fn(i)` for i in [0, count), in any order and thread; must not throw.
  void Add(int64_t count, std::function<void(int64_t)> fn) {
    phases_.push_back(std::make_unique<Phase>());
    phases_.back()->count = count;
    phases_.back()->fn = std::move(fn);
  }

  // Runs all phases; `schedule` runs a function in another thread, some time.
  template <typename Schedule>
  void Run(int64_t threads, Schedule&& schedule) {
    int64_t most = 0;
    for (const auto& phase : phases_) {
      if (phase->count > most) most = phase->count;
    }
    const int64_t helpers = (threads < most ? threads : most) - 1;
    for (int64_t i = 0; i < helpers; ++i) {
      // Helpers may start after all is done and the caller is gone; the job
      // stays for them to see that.
      schedule([self = shared_from_this()] { self->Work(); });
    }
    Work();
  }

 private:
  struct Phase {
    int64_t count = 0;
    std::function<void(int64_t)> fn;
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };

  void Work() {
    for (const auto& phase : phases_) {
      int64_t mine = 0;
      for (;;) {
        const int64_t i = phase->next.fetch_add(1, std::memory_order_relaxed);
        if (i >= phase->count) break;
        phase->fn(i);
        ++mine;
      }
      if (mine > 0) phase->done.fetch_add(mine, std::memory_order_release);
      // What is not done has been started by a thread that is running.
      for (int spins = 0;
           phase->done.load(std::memory_order_acquire) < phase->count;) {
        if (++spins < 4096) {
          Pause();
        } else {
          std::this_thread::yield();
        }
      }
    }
  }

  static void Pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  std::vector<std::unique_ptr<Phase>> phases_;
};

}  // namespace gemma_ext

#endif  // GEMMA_EXT_KERNELS_CPU_PARALLEL_H_
