// Waiting for another process: a short spin, then sleep until its bell rings.
//
// Why no wake-up is lost. Each process has one bell in its own shared memory. A waiter says that it
// sleeps, notes the bell's number, looks once more at what it waits for, and only then asks the
// kernel to sleep unless the number has changed. Whoever changes something for that process stores
// the change first, and then looks whether the process sleeps; if so it moves the number and wakes
// it. All four are sequentially consistent, so in their one order either the change comes before
// the waiter's last look, which sees it, or the waiter's "I sleep" comes before the other's look,
// which then moves the number: before the waiter noted it (and then the waiter sees the change,
// which is older), between the note and the sleep (and then the kernel does not let it sleep), or
// during the sleep (and then it wakes).
//
// A process has one waiter at a time (Group's mutex), so one bell is enough whatever it waits for.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>

namespace gossamer {

struct Bell {
  alignas(64) std::atomic<std::uint32_t> number;
  std::atomic<std::uint32_t> sleeping;

  // Wake the owner if it sleeps; call after the change it may wait for.
  void ring() noexcept {
    if (sleeping.load(std::memory_order_seq_cst) != 0) wake();
  }

 private:
  void wake() noexcept;
};

static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

// How long to look before sleeping.
struct Patience {
  std::chrono::nanoseconds spin;  // without giving the core away
  int yields;                     // then giving it away this often
};

// Sleep until the bell's number is no longer `number`, a signal comes, or `limit` has passed.
void sleep_on(Bell& bell, std::uint32_t number, std::chrono::nanoseconds limit) noexcept;

inline void relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

void give_way() noexcept;  // sched_yield

// Waits until `ready()`; every `slice` asks `stop()`, which says whether to give up. Returns
// whether it became ready.
template <typename Ready, typename Stop>
bool wait_until(Bell& bell, const Patience& patience, std::chrono::nanoseconds slice, Ready&& ready,
                Stop&& stop) {
  constexpr int kLooks = 32;  // between looks at the clock
  if (ready()) return true;
  const auto begin = std::chrono::steady_clock::now();
  do {
    for (int i = 0; i < kLooks; ++i) {
      relax();
      if (ready()) return true;
    }
  } while (std::chrono::steady_clock::now() - begin < patience.spin);
  for (int i = 0; i < patience.yields; ++i) {
    give_way();
    if (ready()) return true;
  }
  while (true) {
    bell.sleeping.store(1, std::memory_order_seq_cst);
    const std::uint32_t number = bell.number.load(std::memory_order_seq_cst);
    const bool done = ready();
    if (!done) sleep_on(bell, number, slice);
    bell.sleeping.store(0, std::memory_order_relaxed);
    if (done || ready()) return true;
    if (stop()) return ready();  // it may have become ready before what made it stop
  }
}

}  // namespace gossamer
