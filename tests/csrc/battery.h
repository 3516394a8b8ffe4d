// Random operations between the processes of a job, each result compared with a serial reference.
//
// Rows and messages are overwritten as soon as an operation returns, and their memory is given
// back: a peer that still read them would compute something else. Delays are drawn too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "group.h"
#include "random_work.h"

namespace gossamer::test {

class Participant {
 public:
  Participant(std::shared_ptr<Group> group, Job job);

  // Round `k` of the job. A wrong bit ends the program; a failure is returned, once it is checked
  // that the rows given to an out-of-place operation are as they were.
  Status round(std::uint64_t k);

 private:
  class Buffer;

  Status average(std::uint64_t k);
  Status sum(std::uint64_t k);
  Status exchange(std::uint64_t k);

  Buffer rows_of(std::uint64_t k, Dtype dtype, std::size_t d);
  [[nodiscard]] std::vector<std::vector<std::byte>> all_rows(std::uint64_t k, Dtype dtype,
                                                             std::size_t d,
                                                             std::uint32_t what) const;
  void compare(const std::byte* found, std::span<const std::byte> expected,
               const std::string& what) const;
  void pause();

  std::shared_ptr<Group> group_;
  Job job_;
  std::uint32_t process_;
  Random own_;  // of this process alone: delays, and where rows lie
};

// A group of a job with address space for the battery.
std::shared_ptr<Group> make_group(const Job& job, std::uint32_t process);

}  // namespace gossamer::test
