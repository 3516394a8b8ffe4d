#include "segment.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <map>
#include <mutex>
#include <stdexcept>
#include <system_error>
#include <utility>

namespace gossamer {
namespace {

constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr mode_t kOwnerOnly = 0600;

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// Closes on every way out.
struct File {
  int fd;
  explicit File(int number) : fd(number) {}
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (fd >= 0) close(fd);
  }
  int release() { return std::exchange(fd, -1); }
};

std::byte* map(int fd, std::size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (at == MAP_FAILED) fail("mapping " + std::to_string(bytes) + " bytes of shared memory");
  return static_cast<std::byte*>(at);
}

// Ranks may be threads of one process (tests under the thread sanitizer, which follows addresses,
// not pages): they share one mapping.
std::mutex own_mutex;
std::map<std::int64_t, std::weak_ptr<Segment>>& own_segments() {
  static std::map<std::int64_t, std::weak_ptr<Segment>> segments;
  return segments;
}

std::atomic<std::int64_t> known_pid{0};  // 0: to be asked for

}  // namespace

std::int64_t process_id() noexcept {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { known_pid.store(0, std::memory_order_relaxed); });
  std::int64_t pid = known_pid.load(std::memory_order_relaxed);
  if (pid == 0 || registered != 0) known_pid.store(pid = getpid(), std::memory_order_relaxed);
  return pid;
}

std::shared_ptr<Segment> Segment::create(const std::string& label, std::size_t bytes) {
  File file(memfd_create(label.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (file.fd < 0) fail("memfd_create");
  if (fchmod(file.fd, kOwnerOnly) != 0) fail("fchmod of shared memory");
  if (ftruncate(file.fd, static_cast<off_t>(bytes)) != 0) {
    fail("reserving " + std::to_string(bytes) + " bytes of shared memory");
  }
  if (fcntl(file.fd, F_ADD_SEALS, kSeals) != 0) fail("sealing shared memory");
  std::shared_ptr<Segment> segment(new Segment());
  segment->data_ = map(file.fd, bytes);
  segment->fd_ = file.release();
  segment->ticket_ = {process_id(), segment->fd_, bytes};
  const std::lock_guard lock(own_mutex);
  own_segments()[segment->fd_] = segment;
  return segment;
}

std::shared_ptr<Segment> Segment::attach(const Ticket& ticket) {
  const std::string owner = "process " + std::to_string(ticket.pid);
  if (ticket.pid == process_id()) {
    const std::lock_guard lock(own_mutex);
    if (auto segment = own_segments()[ticket.fd].lock()) return segment;
    throw std::runtime_error(owner + " has closed its shared memory");
  }
  // Opened first: whatever number `pid` gets later, this handle stays with the process it is now.
  File pidfd(static_cast<int>(syscall(SYS_pidfd_open, static_cast<pid_t>(ticket.pid), 0)));
  if (pidfd.fd < 0) throw std::runtime_error(owner + " is gone");
  const std::string path =
      "/proc/" + std::to_string(ticket.pid) + "/fd/" + std::to_string(ticket.fd);
  File file(open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (file.fd < 0) {
    throw std::runtime_error("the shared memory of " + owner + " cannot be opened (" +
                             std::generic_category().message(errno) +
                             "): it is gone, or belongs to another user");
  }
  struct stat status{};
  if (fstat(file.fd, &status) != 0) fail("fstat of shared memory");
  if (status.st_uid != geteuid()) {
    throw std::runtime_error("the shared memory of " + owner + " belongs to user " +
                             std::to_string(status.st_uid) + ", this process runs as user " +
                             std::to_string(geteuid()));
  }
  if ((status.st_mode & 07777) != kOwnerOnly) {
    throw std::runtime_error("the shared memory of " + owner + " may be opened by other users");
  }
  if (fcntl(file.fd, F_GET_SEALS) != kSeals ||
      static_cast<std::uint64_t>(status.st_size) != ticket.bytes) {
    throw std::runtime_error("the shared memory of " + owner + " is not of this program's kind");
  }
  std::shared_ptr<Segment> segment(new Segment());
  segment->data_ = map(file.fd, ticket.bytes);
  segment->ticket_ = ticket;
  segment->pidfd_ = pidfd.release();
  return segment;
}

Segment::~Segment() {
  if (data_ != nullptr) munmap(data_, ticket_.bytes);
  if (fd_ >= 0) close(fd_);
  if (pidfd_ >= 0) close(pidfd_);
}

bool Segment::owner_alive() const noexcept {
  if (pidfd_ < 0) return true;  // this process
  pollfd ended{.fd = pidfd_, .events = POLLIN, .revents = 0};
  return poll(&ended, 1, 0) == 0;
}

}  // namespace gossamer
