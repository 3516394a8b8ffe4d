// Messages from one process to another: a ring of slots in the sender's shared memory.
//
// Why nothing half-written is read and nothing is overwritten too early: event.h. Each counter has
// one writer, and 64 bits: it never goes around, so a count noted long ago stays comparable.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace gossamer {

struct Message {
  static constexpr std::size_t kInlineBytes = 208;
  static constexpr std::uint64_t kNowhere = ~std::uint64_t{0};

  std::uint64_t total;   // bytes of the whole transfer or row: what the receiver must expect
  std::uint64_t bytes;   // of this piece
  std::uint64_t offset;  // where it lies in the sender's segment; kNowhere: in `payload`
  std::uint64_t stride;  // between rows, where there are several
  std::uint64_t mark;    // for the receiver, as the kind of message says
  std::uint32_t kind;    // of operation, and of elements in its upper half (kind_bits): another
                         // one means that processes went apart
  std::uint32_t rows;
  std::byte payload[kInlineBytes];
};
static_assert(sizeof(Message) == 256);

struct Channel {
  static constexpr std::uint64_t kSlots = 16;

  alignas(64) std::atomic<std::uint64_t> posted;    // messages, by the sender
  alignas(64) std::atomic<std::uint64_t> consumed;  // messages, by the receiver
  std::atomic<std::uint64_t> read;  // pieces, of rows that the sender overwrites piece by piece
  alignas(64) Message slots[kSlots];

  Message& slot(std::uint64_t number) noexcept { return slots[number % kSlots]; }

  // Message number `number` (from 0) can be read.
  [[nodiscard]] bool has(std::uint64_t number) const noexcept {
    return posted.load(std::memory_order_seq_cst) > number;
  }
  // All of the first `count` messages were read.
  [[nodiscard]] bool done(std::uint64_t count) const noexcept {
    return consumed.load(std::memory_order_seq_cst) >= count;
  }
  // A message after the first `count` has a slot.
  [[nodiscard]] bool has_room(std::uint64_t count) const noexcept {
    return count - consumed.load(std::memory_order_seq_cst) < kSlots;
  }
};
static_assert(std::atomic<std::uint64_t>::is_always_lock_free);

}  // namespace gossamer
