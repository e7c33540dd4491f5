// SPDX-License-Identifier: Apache-2.0
// Test double of libnccl.so.2 over the fake driver: ranks are threads or processes that share a
// memory segment named by the unique id; a collective is a step of a stream that waits for the
// other ranks as a kernel would, until somebody aborts it.
//
//   FAKE_NCCL_VERSION=N                      what ncclGetVersion says (22809)
//   FAKE_NCCL_FAIL=function:nth:result[:rank]  that call answers so (nth counts from 1, by rank)
//   FAKE_NCCL_ASYNC=nth:result[:rank]        the nth collective sets the asynchronous error
//   FAKE_NCCL_HANG=nth[:rank]                the nth collective never ends by itself
//   FAKE_NCCL_PROGRESS_MS=N                  every call is "in progress" for so long
//   FAKE_NCCL_FINALIZE_HANGS=1               ncclCommFinalize never gets done
//   FAKE_NCCL_NO_WINDOWS=1                   GPUs without symmetric memory: windows come out null
//   FAKE_NCCL_WINDOW_APART=1                 a failing window does not meet the other ranks'
//   FAKE_NCCL_WINDOW_LATER=result[:rank]     a window fails in NCCL's own thread
// A window lies at an offset that each rank counts for itself, as NCCL does: where the ranks'
// differ the double says "internal error", and NCCL would read and write the wrong memory.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "fake_cuda.h"

namespace {

enum : int {
  kSuccess = 0,
  kSystemError = 2,
  kInternalError = 3,
  kInvalidArgument = 4,
  kInvalidUsage = 5,
  kInProgress = 7
};
constexpr int kMaxRanks = 8;
constexpr size_t kSlotBytes = 64 << 10;
constexpr size_t kPage = 4096;  // what a window has to be aligned to

using Clock = std::chrono::steady_clock;

long setting(const char* name, long otherwise) {
  const char* const text = std::getenv(name);
  return text && *text ? std::strtol(text, nullptr, 10) : otherwise;
}

struct Mailbox {
  std::atomic<int> is_full;
  size_t bytes;
  char data[kSlotBytes];
};

struct Shared {
  std::atomic<int> joined;
  std::atomic<uint64_t> arrived;
  char slots[kMaxRanks][kSlotBytes];
  Mailbox boxes[kMaxRanks][kMaxRanks];  // from, to
  std::atomic<uint64_t> windows_arrived;
  std::atomic<size_t> window_bytes[kMaxRanks];
  std::atomic<size_t> window_places[kMaxRanks];
};

std::atomic<int> g_live{0};
std::atomic<int> g_allocated{0};
std::atomic<int> g_windows{0};
std::atomic<int> g_buffers{0};

}  // namespace

struct ncclComm {
  Shared* shared = nullptr;
  int size = 0;
  int rank = 0;
  char name[64] = "";
  std::atomic<bool> is_aborted{false};
  std::atomic<int> state{kInProgress};
  std::atomic<Clock::rep> busy_until{0};
  std::thread joining;
  std::mutex mutex;
  std::map<std::string, int> calls;
  uint64_t issued = 0;
  std::atomic<uint64_t> done{0};
  uint64_t meets = 0;
  int collectives = 0;
  std::atomic<int> registered{0};
  std::thread registering;
  std::atomic<bool> is_registering{false};
  uint64_t window_meets = 0;
  std::mutex windows_mutex;
  std::map<void*, size_t> windows;  // by handle: their places
};

namespace {

std::mutex g_mutex;
std::map<std::string, int> g_calls;
std::map<void*, size_t> g_blocks;  // of ncclMemAlloc, under g_mutex
// In the thread's static block, where sanitizers can follow it.
[[gnu::tls_model("initial-exec")]] thread_local char t_last_error[200] = "";
void note_error(const std::string& text) {
  std::snprintf(t_last_error, sizeof(t_last_error), "%s", text.c_str());
}

int rank_of(const ncclComm* comm) { return comm ? comm->rank : -1; }

/// What FAKE_NCCL_FAIL wants of this call, else success.
int injected(const char* function, ncclComm* comm) {
  int nth = 0;
  if (comm) {
    std::lock_guard lock(comm->mutex);
    nth = ++comm->calls[function];
  } else {
    std::lock_guard lock(g_mutex);
    nth = ++g_calls[function];
  }
  const char* const text = std::getenv("FAKE_NCCL_FAIL");
  char name[64];
  int at = 0;
  int result = 0;
  int rank = -2;
  if (!text || std::sscanf(text, "%63[^:]:%d:%d:%d", name, &at, &result, &rank) < 3)
    return kSuccess;
  if (std::strcmp(name, function) != 0 || (at > 0 && at != nth)) return kSuccess;
  if (rank >= 0 && comm && rank != rank_of(comm)) return kSuccess;
  note_error(std::string("injected into ") + function);
  return result;
}

/// Success, or "in progress" for a while.
int accepted(ncclComm* comm) {
  const long ms = setting("FAKE_NCCL_PROGRESS_MS", 0);
  if (ms == 0) return kSuccess;
  comm->busy_until = (Clock::now() + std::chrono::milliseconds(ms)).time_since_epoch().count();
  return kInProgress;
}

bool wait(ncclComm* comm, const std::function<bool()>& is_there) {
  while (!is_there()) {
    if (comm->is_aborted) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(20));
  }
  return true;
}

bool meet(ncclComm* comm) {
  const uint64_t all = ++comm->meets * static_cast<uint64_t>(comm->size);
  ++comm->shared->arrived;
  return wait(comm, [&] { return comm->shared->arrived >= all; });
}

size_t width_of(int type) {
  static constexpr size_t kWidths[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
  return type >= 0 && type < 10 ? kWidths[type] : 0;
}

double load(const char* at, int type) {
  const auto as = [&]<class T>(T) {
    T value;
    std::memcpy(&value, at, sizeof(value));
    return static_cast<double>(value);
  };
  switch (type) {
    case 0:
      return as(int8_t{});
    case 1:
      return as(uint8_t{});
    case 2:
      return as(int32_t{});
    case 4:
      return as(int64_t{});
    case 6:
      return as(_Float16{});
    case 7:
      return as(float{});
    case 8:
      return as(double{});
    default: {
      uint16_t half;
      std::memcpy(&half, at, sizeof(half));
      const uint32_t word = static_cast<uint32_t>(half) << 16;
      float value;
      std::memcpy(&value, &word, sizeof(value));
      return value;
    }
  }
}

void store(char* at, int type, double value) {
  const auto as = [&]<class T>(T) {
    const T narrow = static_cast<T>(value);
    std::memcpy(at, &narrow, sizeof(narrow));
  };
  switch (type) {
    case 0:
      return as(int8_t{});
    case 1:
      return as(uint8_t{});
    case 2:
      return as(int32_t{});
    case 4:
      return as(int64_t{});
    case 6:
      return as(_Float16{});
    case 7:
      return as(float{});
    case 8:
      return as(double{});
    default: {
      const float single = static_cast<float>(value);
      uint32_t word;
      std::memcpy(&word, &single, sizeof(word));
      const auto half = static_cast<uint16_t>((word + 0x7fff + ((word >> 16) & 1)) >> 16);
      std::memcpy(at, &half, sizeof(half));
    }
  }
}

double reduced(double a, double b, int op) {
  switch (op) {
    case 1:
      return a * b;
    case 2:
      return std::max(a, b);
    case 3:
      return std::min(a, b);
    default:
      return a + b;
  }
}

/// All ranks' `bytes` of `in` pass by, slot by slot: take(rank, offset, data, bytes).
bool exchange(ncclComm* comm, const char* in, size_t bytes,
              const std::function<void(int, size_t, const char*, size_t)>& take) {
  for (size_t at = 0; at < bytes; at += kSlotBytes) {
    const size_t now = std::min(kSlotBytes, bytes - at);
    std::memcpy(comm->shared->slots[comm->rank], in + at, now);
    if (!meet(comm)) return false;
    for (int r = 0; r < comm->size; ++r) take(r, at, comm->shared->slots[r], now);
    if (!meet(comm)) return false;
  }
  return true;
}

/// out = op over the ranks of count values, of which this rank keeps [first, first + kept).
void reduce(ncclComm* comm, const void* in, char* out, size_t count, int type, int op, size_t first,
            size_t kept) {
  const size_t width = width_of(type);
  std::vector<double> sums(count);
  const bool is_whole = exchange(comm, static_cast<const char*>(in), count * width,
                                 [&](int rank, size_t at, const char* data, size_t bytes) {
                                   for (size_t i = 0; i < bytes / width; ++i) {
                                     double& sum = sums[at / width + i];
                                     const double value = load(data + i * width, type);
                                     sum = rank == 0 ? value : reduced(sum, value, op);
                                   }
                                 });
  if (!is_whole) return;
  for (size_t i = 0; i < kept; ++i)
    store(out + i * width, type, op == 4 ? sums[first + i] / comm->size : sums[first + i]);
}

struct Transfer {  // of a point-to-point group
  bool is_send;
  int peer;
  char* data;
  size_t bytes;
  size_t moved = 0;
};

void run_transfers(ncclComm* comm, std::vector<Transfer> transfers) {
  wait(comm, [&] {
    bool is_done = true;
    for (Transfer& t : transfers) {
      if (t.moved == t.bytes) continue;
      Mailbox& box = t.is_send ? comm->shared->boxes[comm->rank][t.peer]
                               : comm->shared->boxes[t.peer][comm->rank];
      if (t.is_send == (box.is_full.load() != 0)) {
        is_done = false;
        continue;
      }
      if (t.is_send) {
        box.bytes = std::min(kSlotBytes, t.bytes - t.moved);
        std::memcpy(box.data, t.data + t.moved, box.bytes);
      } else {
        std::memcpy(t.data + t.moved, box.data, box.bytes);
      }
      t.moved += box.bytes;
      box.is_full = t.is_send ? 1 : 0;
      is_done = is_done && t.moved == t.bytes;
    }
    return is_done;
  });
}

struct Call {
  ncclComm* comm;
  CUstream_st* stream;
  std::function<void()> run;
  std::vector<Transfer> transfers;
};
[[gnu::tls_model("initial-exec")]] thread_local int t_depth = 0;
[[gnu::tls_model("initial-exec")]] thread_local std::vector<Call>* t_group = nullptr;

struct Step {
  ncclComm* comm;
  uint64_t ticket;
  std::function<void()> run;
};

void enqueue(ncclComm* comm, CUstream_st* stream, std::function<void()> run) {
  uint64_t ticket = 0;
  {
    std::lock_guard lock(comm->mutex);
    ticket = comm->issued++;
  }
  auto* const step = new Step{comm, ticket, std::move(run)};
  fake_cuda_enqueue(
      stream,
      [](void* argument) {
        const std::unique_ptr<Step> owned(static_cast<Step*>(argument));
        ncclComm* const c = owned->comm;
        if (wait(c, [&] { return c->done >= owned->ticket; }) && !c->is_aborted) owned->run();
        ++c->done;
      },
      step);
}

int add(const char* function, ncclComm* comm, CUstream_st* stream, std::function<void()> run,
        std::vector<Transfer> transfers = {}) {
  if (!comm) {
    note_error("no communicator");
    return kInvalidArgument;
  }
  if (const int result = injected(function, comm)) return result;
  if (const int state = comm->state) {
    note_error(state == kInProgress ? "the communicator is not ready" : "it went wrong before");
    return state == kInProgress ? kInvalidUsage : state;
  }
  int nth = 0;
  {
    std::lock_guard lock(comm->mutex);
    nth = ++comm->collectives;
  }
  int at = 0;
  int result = 0;
  int rank = -2;
  if (const char* text = std::getenv("FAKE_NCCL_ASYNC");
      text && std::sscanf(text, "%d:%d:%d", &at, &result, &rank) >= 2 && at == nth &&
      (rank < 0 || rank == comm->rank)) {
    run = [comm, result] {
      note_error("it went wrong later");
      comm->state = result;
    };
    transfers.clear();
  }
  rank = -2;
  if (const char* text = std::getenv("FAKE_NCCL_HANG");
      text && std::sscanf(text, "%d:%d", &at, &rank) >= 1 && at == nth &&
      (rank < 0 || rank == comm->rank)) {
    run = [comm] { wait(comm, [] { return false; }); };
    transfers.clear();
  }
  if (t_depth > 0) {
    t_group->push_back({comm, stream, std::move(run), std::move(transfers)});
    return kSuccess;
  }
  if (!transfers.empty()) run = [comm, transfers] { run_transfers(comm, transfers); };
  enqueue(comm, stream, std::move(run));
  return accepted(comm);
}

bool meet_for_window(ncclComm* comm) {
  const uint64_t all = ++comm->window_meets * static_cast<uint64_t>(comm->size);
  ++comm->shared->windows_arrived;
  return wait(comm, [&] { return comm->shared->windows_arrived >= all; });
}

/// The first place that no window of this rank takes.
size_t free_place(ncclComm* comm) {
  size_t place = 0;
  const auto is_taken = [&](const auto& window) { return window.second == place; };
  while (std::any_of(comm->windows.begin(), comm->windows.end(), is_taken)) ++place;
  return place;
}

/// What the ranks do together to make a window.
int make_window(ncclComm* comm, void* data, size_t bytes, void** window, bool is_wanted) {
  std::unique_lock lock(comm->windows_mutex);
  const size_t place = free_place(comm);
  lock.unlock();
  Shared& shared = *comm->shared;
  shared.window_bytes[comm->rank] = bytes;
  shared.window_places[comm->rank] = place;
  if (!meet_for_window(comm)) return kInternalError;
  bool is_alike = true;
  for (int r = 0; r < comm->size; ++r)
    is_alike = is_alike && shared.window_bytes[r] == bytes && shared.window_places[r] == place;
  if (!meet_for_window(comm)) return kInternalError;
  int result = 0;
  int rank = -2;
  if (const char* text = std::getenv("FAKE_NCCL_WINDOW_LATER");
      text && std::sscanf(text, "%d:%d", &result, &rank) >= 1 && (rank < 0 || rank == comm->rank))
    return result;
  if (!is_alike) return kInternalError;
  if (!is_wanted || setting("FAKE_NCCL_NO_WINDOWS", 0)) return kSuccess;
  lock.lock();
  *window = data;
  comm->windows[data] = place;
  ++g_windows;
  return kSuccess;
}

void forget(ncclComm* comm) {
  if (comm->joining.joinable()) comm->joining.join();
  if (comm->registering.joinable()) comm->registering.join();
  g_windows -= static_cast<int>(comm->windows.size());
  while (comm->done < comm->issued) std::this_thread::sleep_for(std::chrono::microseconds(50));
  if (comm->shared) {
    ::shm_unlink(comm->name);  // nobody else will come
    ::munmap(comm->shared, sizeof(Shared));
  }
  delete comm;
  --g_live;
}

}  // namespace

/// Communicators that nobody has destroyed or aborted.
FAKE_API int fake_nccl_live() { return g_live; }
/// Blocks of ncclMemAlloc that nobody has given back.
FAKE_API int fake_nccl_allocated() { return g_allocated; }
/// Registrations that nobody has undone, nor the end of their communicator.
FAKE_API int fake_nccl_windows() { return g_windows; }
FAKE_API int fake_nccl_buffers() { return g_buffers; }

struct Id {
  char text[128];
};
struct Config {
  size_t bytes;
  unsigned magic, version;
  int blocking;
};

FAKE_API int ncclGetVersion(int* version) {
  *version = static_cast<int>(setting("FAKE_NCCL_VERSION", 22809));
  return injected("ncclGetVersion", nullptr);
}
FAKE_API const char* ncclGetErrorString(int result) {
  static const char* const kTexts[] = {"no error",
                                       "unhandled cuda error",
                                       "unhandled system error",
                                       "internal error",
                                       "invalid argument",
                                       "invalid usage",
                                       "remote process exited or there was a network error",
                                       "in progress"};
  return result >= 0 && result < 8 ? kTexts[result] : "unknown result code";
}
FAKE_API const char* ncclGetLastError(ncclComm*) { return t_last_error; }
FAKE_API int ncclGetUniqueId(Id* id) {
  static std::atomic<int> count{0};
  std::memset(id, 0, sizeof(*id));
  std::snprintf(id->text, 60, "/tpn-fake-%d-%d-%lld", static_cast<int>(::getpid()), count++,
                static_cast<long long>(Clock::now().time_since_epoch().count()));
  return injected("ncclGetUniqueId", nullptr);
}
FAKE_API int ncclCommInitRankConfig(ncclComm** out, int size, Id id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->blocking != 0 || size < 1 || size > kMaxRanks ||
      rank < 0 || rank >= size) {
    note_error("bad arguments");
    return kInvalidArgument;
  }
  auto* const comm = new ncclComm;
  comm->size = size;
  comm->rank = rank;
  if (const int result = injected("ncclCommInitRankConfig", comm)) {
    delete comm;
    *out = nullptr;
    return result;
  }
  ++g_live;
  *out = comm;
  std::memcpy(comm->name, id.text, sizeof(comm->name) - 1);
  const int fd = ::shm_open(comm->name, O_CREAT | O_RDWR | O_CLOEXEC, 0600);
  if (fd < 0 || ::ftruncate(fd, sizeof(Shared)) != 0) return kSystemError;
  void* const memory = ::mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (memory == MAP_FAILED) return kSystemError;
  comm->shared = static_cast<Shared*>(memory);
  ++comm->shared->joined;
  comm->joining = std::thread([comm] {
    const auto all = [&] { return comm->shared->joined >= comm->size; };
    if (!wait(comm, all)) return;
    ::shm_unlink(comm->name);  // all have mapped it
    comm->state = kSuccess;
  });
  return kInProgress;
}
FAKE_API int ncclCommGetAsyncError(ncclComm* comm, int* state) {
  if (!comm) return kInvalidArgument;
  if (const int result = injected("ncclCommGetAsyncError", comm)) return result;
  *state = comm->state;
  if (*state == kSuccess && comm->is_registering) *state = kInProgress;
  if (*state == kSuccess && Clock::now().time_since_epoch().count() < comm->busy_until)
    *state = kInProgress;
  return kSuccess;
}
FAKE_API int ncclCommFinalize(ncclComm* comm) {
  if (const int result = injected("ncclCommFinalize", comm)) return result;
  if (setting("FAKE_NCCL_FINALIZE_HANGS", 0)) {
    comm->state = kInProgress;
    return kInProgress;
  }
  return accepted(comm);
}
FAKE_API int ncclCommDestroy(ncclComm* comm) {
  if (const int result = injected("ncclCommDestroy", comm)) return result;
  if (comm->registered != 0 || !comm->windows.empty()) return kInvalidUsage;  // somebody forgot
  forget(comm);
  return kSuccess;
}
FAKE_API int ncclCommAbort(ncclComm* comm) {
  (void)injected("ncclCommAbort", comm);
  comm->is_aborted = true;
  forget(comm);
  return kSuccess;
}
FAKE_API int ncclMemAlloc(void** data, size_t bytes) {
  if (const int result = injected("ncclMemAlloc", nullptr)) return result;
  *data = std::aligned_alloc(kPage, (bytes + kPage - 1) / kPage * kPage);
  ++g_allocated;
  std::lock_guard lock(g_mutex);
  g_blocks[*data] = bytes;
  return kSuccess;
}
FAKE_API int ncclMemFree(void* data) {
  {
    std::lock_guard lock(g_mutex);
    g_blocks.erase(data);
  }
  std::free(data);
  --g_allocated;
  return kSuccess;
}
FAKE_API int ncclCommRegister(ncclComm* comm, void* data, size_t, void** registration) {
  if (const int result = injected("ncclCommRegister", comm)) return result;
  ++comm->registered;
  ++g_buffers;
  *registration = data;
  return kSuccess;
}
FAKE_API int ncclCommDeregister(ncclComm* comm, void*) {
  --comm->registered;
  --g_buffers;
  return injected("ncclCommDeregister", comm);
}
FAKE_API int ncclCommWindowRegister(ncclComm* comm, void* data, size_t bytes, void** window,
                                    int flags) {
  const int refused = injected("ncclCommWindowRegister", comm);
  if (refused != kSuccess && setting("FAKE_NCCL_WINDOW_APART", 0)) return refused;
  {
    std::lock_guard lock(g_mutex);
    const auto block = g_blocks.find(data);
    if (flags != 1 || block == g_blocks.end() || block->second < bytes) {
      note_error("a symmetric window is made of a block of ncclMemAlloc");
      return kInvalidArgument;
    }
  }
  if (comm->registering.joinable()) comm->registering.join();
  *window = nullptr;
  comm->is_registering = true;
  comm->registering = std::thread([=] {
    if (const int result = make_window(comm, data, bytes, window, refused == kSuccess))
      comm->state = result;
    comm->is_registering = false;
  });
  if (refused == kSuccess) return kInProgress;
  comm->registering.join();  // it met the others, and then failed
  return refused;
}
FAKE_API int ncclCommWindowDeregister(ncclComm* comm, void* window) {
  if (const int result = injected("ncclCommWindowDeregister", comm)) return result;
  std::lock_guard lock(comm->windows_mutex);
  if (comm->windows.erase(window) == 0) return kInvalidArgument;
  --g_windows;
  return kSuccess;
}
FAKE_API int ncclGroupStart() {
  if (const int result = injected("ncclGroupStart", nullptr)) return result;
  if (t_depth++ == 0) t_group = new std::vector<Call>;
  return kSuccess;
}
FAKE_API int ncclGroupEnd() {
  if (t_depth == 0) return kInvalidUsage;
  if (--t_depth > 0) return kSuccess;
  const std::unique_ptr<std::vector<Call>> calls(std::exchange(t_group, nullptr));
  if (const int result = injected("ncclGroupEnd", nullptr)) return result;
  std::map<std::pair<ncclComm*, CUstream_st*>, std::vector<Transfer>> transfers;
  int result = kSuccess;
  for (Call& call : *calls) {
    if (call.transfers.empty()) {
      enqueue(call.comm, call.stream, std::move(call.run));
      result = accepted(call.comm);
    } else {
      auto& all = transfers[{call.comm, call.stream}];
      all.insert(all.end(), call.transfers.begin(), call.transfers.end());
    }
  }
  for (auto& [where, all] : transfers) {
    ncclComm* const comm = where.first;
    enqueue(comm, where.second, [comm, all = std::move(all)] { run_transfers(comm, all); });
    result = accepted(comm);
  }
  return result;
}
FAKE_API int ncclAllReduce(const void* in, void* out, size_t count, int type, int op,
                           ncclComm* comm, CUstream_st* stream) {
  return add("ncclAllReduce", comm, stream,
             [=] { reduce(comm, in, static_cast<char*>(out), count, type, op, 0, count); });
}
FAKE_API int ncclReduceScatter(const void* in, void* out, size_t count, int type, int op,
                               ncclComm* comm, CUstream_st* stream) {
  return add("ncclReduceScatter", comm, stream, [=] {
    reduce(comm, in, static_cast<char*>(out), count * static_cast<size_t>(comm->size), type, op,
           count * static_cast<size_t>(comm->rank), count);
  });
}
FAKE_API int ncclAllGather(const void* in, void* out, size_t count, int type, ncclComm* comm,
                           CUstream_st* stream) {
  return add("ncclAllGather", comm, stream, [=] {
    const size_t bytes = count * width_of(type);
    exchange(comm, static_cast<const char*>(in), bytes,
             [&](int rank, size_t at, const char* data, size_t now) {
               std::memcpy(static_cast<char*>(out) + static_cast<size_t>(rank) * bytes + at, data,
                           now);
             });
  });
}
FAKE_API int ncclBroadcast(const void* in, void* out, size_t count, int type, int root,
                           ncclComm* comm, CUstream_st* stream) {
  return add("ncclBroadcast", comm, stream, [=] {
    exchange(comm, static_cast<const char*>(comm->rank == root ? in : out), count * width_of(type),
             [&](int rank, size_t at, const char* data, size_t now) {
               if (rank == root) std::memcpy(static_cast<char*>(out) + at, data, now);
             });
  });
}
FAKE_API int ncclSend(const void* data, size_t count, int type, int peer, ncclComm* comm,
                      CUstream_st* stream) {
  return add("ncclSend", comm, stream, {},
             {{true, peer, static_cast<char*>(const_cast<void*>(data)), count * width_of(type)}});
}
FAKE_API int ncclRecv(void* data, size_t count, int type, int peer, ncclComm* comm,
                      CUstream_st* stream) {
  return add("ncclRecv", comm, stream, {},
             {{false, peer, static_cast<char*>(data), count * width_of(type)}});
}
