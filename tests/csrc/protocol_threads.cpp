// Ranks as threads of one process, for the thread sanitizer: it follows addresses, and
// Segment::attach() gives threads one mapping.
//   protocol_threads SEED ROUNDS     ROUNDS of each job, with 2 to 8 processes
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "battery.h"
#include "channel.h"

namespace {

using namespace gossamer;
using namespace gossamer::test;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "WRONG: %s\n", what);
  std::_Exit(3);
}

// The counters of a channel pass 2^31 and 2^32, which no test lives to see.
void counters_go_on() {
  const auto channel = std::make_unique<Channel>();
  for (std::uint64_t sent = 0xffffffe0; sent != 0x100000020; ++sent) {
    channel->consumed.store(sent - Channel::kSlots);
    channel->posted.store(sent);
    require(!channel->has_room(sent), "a full ring has no room");
    require(channel->has(sent - 1) && !channel->has(sent), "posted is what was posted");
    require(channel->done(sent - Channel::kSlots), "what was consumed is done");
    require(!channel->done(sent - Channel::kSlots + 1), "what was not is not");
    channel->consumed.store(sent);
    require(channel->has_room(sent) && channel->done(sent), "an empty ring has room");
    require(&channel->slot(sent) != &channel->slot(sent + 1), "the next slot is another");
    require(&channel->slot(sent) == &channel->slot(sent + Channel::kSlots), "slots go around");
    // A count that was noted long ago, of rows that were lent say.
    require(channel->done(1) && channel->done(sent - (std::uint64_t{1} << 31)), "done stays done");
  }
}

void run(std::uint64_t seed, std::uint32_t processes, std::uint64_t rounds) {
  const Job job = draw_job(seed, processes);
  std::vector<std::shared_ptr<Group>> groups;
  std::vector<Ticket> tickets;
  for (std::uint32_t p = 0; p < processes; ++p) {
    groups.push_back(make_group(job, p));
    tickets.push_back(groups.back()->ticket());
  }
  std::vector<std::jthread> threads;
  for (std::uint32_t p = 0; p < processes; ++p) {
    threads.emplace_back([&, p] {
      groups[p]->attach(tickets);
      Participant participant(groups[p], job);
      for (std::uint64_t k = 0; k < rounds; ++k) {
        const Status s = participant.round(k);
        if (s.ok()) continue;
        std::fprintf(stderr, "WRONG: seed %llu, round %llu: process %u of %u: outcome %d of %u\n",
                     static_cast<unsigned long long>(seed), static_cast<unsigned long long>(k), p,
                     processes, static_cast<int>(s.outcome), s.peer);
        std::_Exit(3);
      }
      groups[p]->set_interrupt(nullptr);
    });
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const auto seed = std::strtoull(argv[1], nullptr, 10),
             rounds = std::strtoull(argv[2], nullptr, 10);
  counters_go_on();
  for (std::uint32_t processes = 2; processes <= 8; ++processes) run(seed, processes, rounds);
  std::printf("%llu rounds\n", 7 * rounds);
}
