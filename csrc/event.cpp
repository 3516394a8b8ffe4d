#include "event.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

namespace gossamer {
namespace {

// Not FUTEX_PRIVATE_FLAG: the word is shared between processes.
void futex(std::atomic<std::uint32_t>& word, int operation, std::uint32_t value,
           const timespec* limit) noexcept {
  static_assert(sizeof word == sizeof(std::uint32_t));
  syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), operation, value, limit, nullptr, 0);
}

}  // namespace

void Bell::wake() noexcept {
  number.fetch_add(1, std::memory_order_seq_cst);
  futex(number, FUTEX_WAKE, 1, nullptr);
}

void sleep_on(Bell& bell, std::uint32_t number, std::chrono::nanoseconds limit) noexcept {
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(limit);
  const timespec relative{.tv_sec = static_cast<time_t>(seconds.count()),
                          .tv_nsec = static_cast<long>((limit - seconds).count())};
  futex(bell.number, FUTEX_WAIT, number, &relative);
}

void give_way() noexcept { sched_yield(); }

}  // namespace gossamer
