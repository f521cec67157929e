// Copyright 2026 The gemma_ext Authors.
// SPDX-License-Identifier: Apache-2.0
//
// Work in parts on a pool that may be busy with its caller.

#ifndef GEMMA_EXT_KERNELS_CPU_PARALLEL_H_
#define GEMMA_EXT_KERNELS_CPU_PARALLEL_H_

#include <atomic>
#include <chrono>
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

inline void Pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

class Job;

// Helpers that wait a moment for the next job: waking a thread up takes longer
// than many a job of decoding does.
class Crew {
 public:
  static Crew& Get() {
    static Crew* crew = new Crew;  // Threads may outlive what exit destroys.
    return *crew;
  }

  // Offers a job; returns how many threads are waiting for one.
  int64_t Offer(std::shared_ptr<Job> job);

  // Takes a job back that is done.
  void Forget(const Job* job);

  // Works on what is offered until nothing was for a while.
  void Serve(uint64_t seen);

 private:
  static constexpr auto kPatience = std::chrono::microseconds(100);

  class Lock {
   public:
    explicit Lock(std::atomic_flag& flag) : flag_(flag) {
      while (flag_.test_and_set(std::memory_order_acquire)) Pause();
    }
    ~Lock() { flag_.clear(std::memory_order_release); }

   private:
    std::atomic_flag& flag_;
  };

  std::atomic_flag busy_ = ATOMIC_FLAG_INIT;
  std::shared_ptr<Job> job_;
  alignas(64) std::atomic<uint64_t> offers_{0};
  alignas(64) std::atomic<int64_t> waiting_{0};
};

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
  // `again`: more jobs are to be expected at once.
  template <typename Schedule>
  void Run(int64_t threads, bool again, Schedule&& schedule) {
    int64_t most = 0;
    for (const auto& phase : phases_) {
      if (phase->count > most) most = phase->count;
    }
    int64_t helpers = (threads < most ? threads : most) - 1;
    if (again && helpers > 0) {
      helpers -= Crew::Get().Offer(shared_from_this());
    }
    for (int64_t i = 0; i < helpers; ++i) {
      // Helpers may start after all is done and the caller is gone; the job
      // stays for them to see that.
      schedule([self = shared_from_this(), again] {
        self->Work();
        if (again) Crew::Get().Serve(self->offer_);
      });
    }
    Work();
    if (again) Crew::Get().Forget(this);
  }

 private:
  friend class Crew;

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

  std::vector<std::unique_ptr<Phase>> phases_;
  uint64_t offer_ = 0;
};

inline int64_t Crew::Offer(std::shared_ptr<Job> job) {
  {
    Lock lock(busy_);
    job->offer_ = offers_.load(std::memory_order_relaxed) + 1;
    job_ = std::move(job);
    offers_.store(job_->offer_, std::memory_order_release);
  }
  return waiting_.load(std::memory_order_relaxed);
}

inline void Crew::Forget(const Job* job) {
  std::shared_ptr<Job> gone;  // Dies outside the lock.
  Lock lock(busy_);
  if (job_.get() == job) gone.swap(job_);
}

inline void Crew::Serve(uint64_t seen) {
  using Clock = std::chrono::steady_clock;
  waiting_.fetch_add(1, std::memory_order_relaxed);
  for (Clock::time_point begun = Clock::now();;) {
    if (offers_.load(std::memory_order_acquire) != seen) {
      std::shared_ptr<Job> job;
      {
        Lock lock(busy_);
        seen = offers_.load(std::memory_order_relaxed);
        job = job_;
      }
      if (job == nullptr) continue;
      waiting_.fetch_sub(1, std::memory_order_relaxed);
      job->Work();
      waiting_.fetch_add(1, std::memory_order_relaxed);
      begun = Clock::now();
    }
    for (int i = 0; i < 16; ++i) Pause();
    if (Clock::now() - begun > kPatience) break;
  }
  waiting_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace gemma_ext

#endif  // GEMMA_EXT_KERNELS_CPU_PARALLEL_H_
