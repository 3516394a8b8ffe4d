// A piece of memory that the processes of one user and one job share, on one host.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace gossamer {

using JobId = std::array<std::byte, 16>;  // drawn anew for each group: two jobs never meet

// How a peer finds a segment: the file descriptor `fd` of process `pid`.
struct Ticket {
  std::int64_t pid;
  std::int64_t fd;
  std::uint64_t bytes;
};

// getpid(), without a system call.
[[nodiscard]] std::int64_t process_id() noexcept;

// Memory from memfd_create: it has no name in any file system, does not count against the size of
// /dev/shm, and the kernel frees it when the last process that maps it is gone, however it ended.
class Segment {
 public:
  // Of this process. Pages take memory when first written. Throws std::system_error.
  static std::shared_ptr<Segment> create(const std::string& label, std::size_t bytes);

  // A peer's. Throws std::runtime_error where the peer is gone, where the segment belongs to
  // another user, can be opened by others, or could be cut short by its owner under our feet.
  static std::shared_ptr<Segment> attach(const Ticket& ticket);

  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] std::size_t size() const noexcept { return ticket_.bytes; }
  [[nodiscard]] const Ticket& ticket() const noexcept { return ticket_; }

  // Whether the process that made it still runs.
  [[nodiscard]] bool owner_alive() const noexcept;

 private:
  Segment() = default;

  std::byte* data_ = nullptr;
  Ticket ticket_{};
  int fd_ = -1;     // of an own segment
  int pidfd_ = -1;  // of a peer's owner
};

}  // namespace gossamer
