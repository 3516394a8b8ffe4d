// Messages of any size between two processes of a group, several at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "group.h"

namespace gossamer {

// One buffer on its way to or from a peer.
struct Transfer {
  std::uint32_t peer;
  std::byte* data;
  std::size_t bytes;
  std::size_t moved = 0;   // so far posted, or received
  std::uint64_t last = 0;  // sends from the arena: number of the message, to be consumed
  bool direct = false, done = false;
};

// A batch of transfers; the group moves it on whenever it waits for anything.
class Exchange {
 public:
  // Throws, with nothing sent, where a peer is none of the group or this process itself.
  Exchange(std::shared_ptr<Group> group, std::vector<Transfer> sends,
           std::vector<Transfer> receives);
  ~Exchange();  // unfinished: the group fails, as the peers would wait in vain
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Until every buffer may be reused. The buffers must live until then.
  Status wait(double timeout_s);
  // Moves on what can be, without waiting. Returns nothing while transfers are on their way, then
  // what wait() would.
  std::optional<Status> test();

 private:
  void give_up() noexcept;  // its buffers are about to go
  [[nodiscard]] bool finished() const;
  [[nodiscard]] std::vector<std::uint32_t> waiting_for() const;

  std::shared_ptr<Group> group_;
  std::vector<Transfer> sends_, receives_;
};

}  // namespace gossamer
