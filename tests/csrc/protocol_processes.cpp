// Ranks as forked processes, for the address and undefined-behaviour sanitizers.
//   protocol_processes run SEED ROUNDS    ROUNDS of each job, with 2 to 8 processes
//   protocol_processes kill SEED JOBS     as many jobs, one process of each killed at any instant
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <string>

#include "battery.h"

namespace {

using namespace gossamer;
using namespace gossamer::test;
using Clock = std::chrono::steady_clock;

// A waiting survivor looks every 50 ms whether its peer lives, and the next one is told by it. The
// rest is what a sanitizer takes on a busy machine; less than the battery's own timeout.
constexpr auto kBound = std::chrono::seconds(120);

[[noreturn]] void wrong(const Job& job, const std::string& what) {
  std::fprintf(stderr, "WRONG: seed %llu, %u processes: %s\n",
               static_cast<unsigned long long>(job.seed), job.processes(), what.c_str());
  std::exit(3);
}

struct Pipe {
  int read_end, write_end;
  Pipe() {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) std::abort();
    read_end = ends[0];
    write_end = ends[1];
  }
};

template <typename T>
void put(int fd, const T& value) {
  if (write(fd, &value, sizeof value) != sizeof value) std::_Exit(4);
}
template <typename T>
bool get(int fd, T& value) {
  return read(fd, &value, sizeof value) == sizeof value;
}

struct Child {
  pid_t pid;
  Pipe up, down;
};

// What a rank does: meets the others through its parent, then works until told or until it fails.
int work(const Job& job, std::uint32_t process, std::uint64_t rounds, const Child& self) {
  const auto group = make_group(job, process);
  put(self.up.write_end, group->ticket());
  std::vector<Ticket> tickets(job.processes());
  for (Ticket& ticket : tickets) {
    if (!get(self.down.read_end, ticket)) return 4;
  }
  group->attach(tickets);
  put(self.up.write_end, Status{});
  Participant participant(group, job);
  Status status;
  for (std::uint64_t k = 0; status.ok() && k < rounds; ++k) status = participant.round(k);
  group->set_interrupt(nullptr);
  put(self.up.write_end, status);
  return 0;
}

std::vector<Child> start(const Job& job, std::uint64_t rounds) {
  std::vector<Child> children(job.processes());
  for (std::uint32_t p = 0; p < job.processes(); ++p) {
    std::fflush(nullptr);
    children[p].pid = fork();
    if (children[p].pid == 0) std::exit(work(job, p, rounds, children[p]));
  }
  std::vector<Ticket> tickets(job.processes());
  for (std::uint32_t p = 0; p < job.processes(); ++p) {
    if (!get(children[p].up.read_end, tickets[p])) wrong(job, "a process did not start");
  }
  for (const Child& child : children) {
    for (const Ticket& ticket : tickets) put(child.down.write_end, ticket);
  }
  for (const Child& child : children) {
    Status attached;
    if (!get(child.up.read_end, attached)) wrong(job, "a process did not attach");
  }
  return children;
}

void close_all(const std::vector<Child>& children) {
  for (const Child& child : children) {
    for (const Pipe& ends : {child.up, child.down}) {
      close(ends.read_end);
      close(ends.write_end);
    }
  }
}

// Whether any process still maps or holds memory of the job; its segments are named for it.
bool in_use(const Job& job) {
  std::string name = "gossamer-" + std::to_string(geteuid()) + "-";
  for (std::size_t k = 0; k < 4; ++k) {
    char hex[3];
    std::snprintf(hex, sizeof hex, "%02x", std::to_integer<unsigned>(job.id[k]));
    name += hex;
  }
  namespace fs = std::filesystem;
  std::error_code ignored;  // processes end while we look
  for (const auto& process : fs::directory_iterator("/proc", ignored)) {
    std::ifstream maps(process.path() / "maps");
    for (std::string line; std::getline(maps, line);) {
      if (line.find(name) != std::string::npos) return true;
    }
    for (const auto& file : fs::directory_iterator(process.path() / "fd", ignored)) {
      if (fs::read_symlink(file.path(), ignored).string().find(name) != std::string::npos) {
        return true;
      }
    }
  }
  return false;
}

std::set<std::string> named_memory() {
  std::set<std::string> names;
  for (const auto& file : std::filesystem::directory_iterator("/dev/shm")) {
    if (file.path().filename().string().starts_with("gossamer")) names.insert(file.path());
  }
  return names;
}

void run(std::uint64_t seed, std::uint32_t processes, std::uint64_t rounds) {
  const Job job = draw_job(seed, processes);
  const auto children = start(job, rounds);
  for (std::uint32_t p = 0; p < processes; ++p) {
    Status status;
    int ended = 0;
    const bool told = get(children[p].up.read_end, status);
    waitpid(children[p].pid, &ended, 0);
    if (!told || ended != 0) wrong(job, "process " + std::to_string(p) + " crashed");
    if (!status.ok()) {
      wrong(job, "outcome " + std::to_string(static_cast<int>(status.outcome)) + " of " +
                     std::to_string(status.peer));
    }
  }
  close_all(children);
  if (in_use(job)) wrong(job, "memory is left");
}

void kill_one(std::uint64_t seed) {
  Random random(seed);
  const Job job = draw_job(random.next(), 2 + random.below(5));
  const auto children = start(job, ~std::uint64_t{0});
  if (!in_use(job)) wrong(job, "the search for its memory finds nothing");
  const std::uint32_t victim = random.below(job.processes());
  usleep(static_cast<useconds_t>(random.below(random.one_in(2) ? 3'000 : 150'000)));
  const auto killed = Clock::now();
  kill(children[victim].pid, SIGKILL);
  for (std::uint32_t p = 0; p < job.processes(); ++p) {
    if (p == victim) continue;
    pollfd answer{.fd = children[p].up.read_end, .events = POLLIN, .revents = 0};
    const auto left = std::chrono::ceil<std::chrono::milliseconds>(killed + kBound - Clock::now());
    if (poll(&answer, 1, static_cast<int>(std::max<long>(left.count(), 0))) != 1) {
      wrong(job, "process " + std::to_string(p) + " waits for the dead");
    }
    Status status;
    if (!get(children[p].up.read_end, status)) {
      wrong(job, "process " + std::to_string(p) + " crashed");
    }
    const bool lost = status.outcome == Outcome::kLost && status.peer == victim;
    const bool stopped =
        (status.outcome == Outcome::kStopped || status.outcome == Outcome::kTorn) &&
        status.peer != victim;
    // One that was told of the failure and has ended has left its group.
    const bool left_after =
        (status.outcome == Outcome::kLeft || status.outcome == Outcome::kLost) &&
        status.peer != victim;
    if (!lost && !stopped && !left_after) {
      wrong(job, "outcome " + std::to_string(static_cast<int>(status.outcome)) + " of " +
                     std::to_string(status.peer) + ", killed was " + std::to_string(victim));
    }
  }
  for (std::uint32_t p = 0; p < job.processes(); ++p) {
    int ended = 0;
    waitpid(children[p].pid, &ended, 0);
    if (p != victim && ended != 0) wrong(job, "process " + std::to_string(p) + " crashed");
  }
  close_all(children);
  if (in_use(job)) wrong(job, "memory is left");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  signal(SIGPIPE, SIG_IGN);
  const auto seed = std::strtoull(argv[2], nullptr, 10),
             count = std::strtoull(argv[3], nullptr, 10);
  const auto names = named_memory();
  if (std::strcmp(argv[1], "kill") == 0) {
    for (std::uint64_t k = 0; k < count; ++k) kill_one(key_of(seed, k));
    std::printf("%llu kills\n", static_cast<unsigned long long>(count));
  } else {
    for (std::uint32_t processes = 2; processes <= 8; ++processes) run(seed, processes, count);
    std::printf("%llu rounds\n", static_cast<unsigned long long>(7 * count));
  }
  if (named_memory() != names) return 5;
}
