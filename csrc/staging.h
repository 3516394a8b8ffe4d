// Parts of a range of offsets, handed out one after another and around: what was taken first is
// free again first. Once all is free it starts over, at memory that is still in cache.
#pragma once

#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

namespace gossamer {

struct Staged {  // free when its messages were read
  std::uint64_t begin, end;
  std::vector<std::pair<std::uint32_t, std::uint64_t>> until;  // (peer, messages consumed)
};

class StagingRing {
 public:
  StagingRing(std::uint64_t begin, std::uint64_t end) : begin_(begin), end_(end), next_(begin) {}

  // A part of `size` bytes, or nullptr while older ones are not read. It stays where it is until
  // the next call.
  template <typename IsRead>
  Staged* take(std::uint64_t size, IsRead&& is_read) {
    while (!parts_.empty() && is_read(parts_.front())) parts_.pop_front();
    if (parts_.empty()) next_ = begin_;
    // In use: from the front part's begin up to next_, around the end.
    const bool wrapped = !parts_.empty() && next_ <= parts_.front().begin;
    const std::uint64_t limit = wrapped ? parts_.front().begin : end_;
    if (next_ + size > limit) {
      if (wrapped || parts_.empty() || begin_ + size > parts_.front().begin) return nullptr;
      next_ = begin_;
    }
    Staged& part = parts_.emplace_back(Staged{next_, next_ + size, {}});
    next_ += size;
    return &part;
  }

  [[nodiscard]] const std::deque<Staged>& parts() const noexcept { return parts_; }

 private:
  std::uint64_t begin_, end_, next_;
  std::deque<Staged> parts_;
};

}  // namespace gossamer
