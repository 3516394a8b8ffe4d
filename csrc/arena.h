// Which parts of a range of offsets are in use: first fit, neighbours merged when freed.
#pragma once

#include <cstdint>
#include <map>
#include <optional>

namespace gossamer {

class Arena {
 public:
  Arena(std::uint64_t begin, std::uint64_t end) { free_[begin] = end; }

  // The offset of `bytes`, a multiple of 64 if `begin` is; none where they do not fit.
  std::optional<std::uint64_t> take(std::uint64_t bytes) {
    bytes = (bytes + 63) / 64 * 64;
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      const auto [begin, end] = *it;
      if (end - begin < bytes) continue;
      free_.erase(it);
      if (end - begin > bytes) free_[begin + bytes] = end;
      taken_[begin] = begin + bytes;
      return begin;
    }
    return std::nullopt;
  }

  // Returns the number of bytes given back; 0 where `begin` was not taken.
  std::uint64_t give_back(std::uint64_t begin) {
    const auto node = taken_.extract(begin);
    if (node.empty()) return 0;
    std::uint64_t end = node.mapped();
    const std::uint64_t bytes = end - begin;
    const auto after = free_.find(end);
    if (after != free_.end()) {
      end = after->second;
      free_.erase(after);
    }
    const auto before = free_.lower_bound(begin);
    if (before != free_.begin() && std::prev(before)->second == begin) {
      std::prev(before)->second = end;
    } else {
      free_[begin] = end;
    }
    return bytes;
  }

 private:
  std::map<std::uint64_t, std::uint64_t> free_, taken_;  // begin -> end
};

}  // namespace gossamer
