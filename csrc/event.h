// Waiting for another process: a short spin, then sleep until its bell rings.
//
// The protocol, and why it holds. A channel (channel.h) has three counters in shared memory, each
// with one writer: `posted` is the sender's, `consumed` and `read` are the receiver's. A process
// has one bell in its own segment, which its peers ring.
//
// No row is read half-written. The sender writes the slot, and the rows that it points to, and then
// stores `posted`; the receiver reads them after it loaded a `posted` that counts the message: the
// load synchronises with the store.
//
// No row is overwritten while it is read. The receiver stores `consumed` (or `read`, of one piece)
// after its last read; the sender writes a slot or a row again after it loaded a counter that
// covers it. The one exception: a process whose call failed may do with its rows as it likes, after
// it has left its readers two seconds to finish. It first says so (Group::failed), and a reader
// looks for that after it has read, before it believes a row.
//
// No wake-up is lost. A waiter (1) stores `sleeping` = 1, (2) notes the bell's number, (3) looks
// once more at what it waits for, and (4) lets the kernel put it to sleep unless the number has
// moved since. Whoever changes something for that process (a) stores the change, (b) loads
// `sleeping`, and where that is not 0 (c) moves the number and (d) wakes it. 1, 2, 3, a, b and c
// are sequentially consistent: release stores would not do, as 3 could then pass 1 in the store
// buffer, or b pass a. In their one order either a comes before 3, which sees the change; or 1
// comes before b, which sees the 1, and then c comes before 2 (so a comes before 3, which sees the
// change), between 2 and 4 (so the kernel does not let it sleep: it compares and queues as one
// step), or after 4 (so d wakes it). That `sleeping` goes back to 0 late costs a needless wake-up
// at most. It does not matter what is waited for, nor that a ring for something else may come: the
// waiter looks and sleeps again. A process has one waiter at a time (Group's mutex), so one bell is
// enough.
//
// Nobody waits for a dead process. A sleep lasts one slice (50 ms) at most; then the waiter looks
// whether the peer lives, has left or has failed, and whether its time is up; and once more at what
// it waits for, which may have come before the peer's end. A process killed between any two steps
// either stored a counter, and then all that it covers is whole, or did not, and then nobody reads
// it; if it did not come to ring, the slice ends the sleep.
//
// tests/runtime/test_wait_protocol.py goes through every interleaving of these steps, with kills
// and with x86's store buffers, and shows that none can be left out.
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
