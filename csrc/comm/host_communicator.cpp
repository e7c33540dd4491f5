// SPDX-License-Identifier: Apache-2.0
// Life, announcements, waits and failures. The collectives themselves are in host_collectives.cpp.
#include "comm/host_communicator.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>

#include <algorithm>
#include <cstdio>

#include "core/callbacks.h"

namespace tp_native::comm {
namespace {

constexpr double kYieldSeconds = 1e-3;  // a peer between two operations is usually back within this
constexpr long kSliceNanoseconds =
    20'000'000;  // a lost wake-up or a signal costs one slice at most
constexpr double kWarnSeconds = 30;

double now_s() {
  timespec t;
  ::clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

void cpu_pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// The futex word is the low half of the tick.
uint32_t* futex_word(std::atomic<uint64_t>& tick) {
  static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);
  return reinterpret_cast<uint32_t*>(&tick);
}

uint64_t mix(uint64_t hash, uint64_t word) {
  hash = (hash ^ word) * 0x9e3779b97f4a7c15ull;
  return hash ^ (hash >> 32);
}

uint64_t hash_signature(const Signature& s) {
  uint64_t hash = mix(0, static_cast<uint64_t>(s.op) | static_cast<uint64_t>(s.dtype) << 8 |
                             static_cast<uint64_t>(s.reduce) << 16 |
                             static_cast<uint64_t>(static_cast<uint16_t>(s.root)) << 24 |
                             static_cast<uint64_t>(static_cast<uint16_t>(s.dim)) << 40);
  hash = mix(hash, s.shape.size());
  for (const int64_t n : s.shape) hash = mix(hash, static_cast<uint64_t>(n));
  hash = mix(hash, s.sizes.size());
  for (const int64_t n : s.sizes) hash = mix(hash, static_cast<uint64_t>(n));
  return hash;
}

std::string describe(uint8_t op, uint8_t dtype, uint8_t reduce, int root, int dim,
                     std::span<const int64_t> shape) {
  std::ostringstream text;
  const auto code = static_cast<OpCode>(op);
  text << name(code);
  if (code == OpCode::kBarrier) return text.str();
  text << '(';
  if (code == OpCode::kAllReduce || code == OpCode::kReduceScatter)
    text << name(static_cast<ReduceOp>(reduce)) << ", ";
  text << name(static_cast<DType>(dtype)) << " [";
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << ']';
  if (root >= 0) text << ", src " << root;
  if (dim >= 0) text << ", dim " << dim;
  text << ')';
  return text.str();
}

/// Pauses before the first yield. Few even where every rank has a core: the scheduler may put two
/// ranks on one for a while, and then each hop costs the whole spin.
int spin_pauses(int size) {
  cpu_set_t set;
  const int allowed = ::sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  const bool is_pinned = allowed == 1;  // one core each, presumably
  return is_pinned || size <= allowed ? 400 : 20;
}

}  // namespace

const char* name(OpCode op) {
  constexpr const char* kNames[] = {"barrier",
                                    "all_reduce",
                                    "all_gather",
                                    "reduce_scatter",
                                    "broadcast",
                                    "copy_to_ranks",
                                    "row_parallel_linear",
                                    "column_parallel_linear",
                                    "vocab_parallel_embedding",
                                    "gather",
                                    "scatter"};
  const auto index = static_cast<size_t>(op);
  return index < sizeof(kNames) / sizeof(kNames[0]) ? kNames[index] : "unknown operation";
}

uint64_t hash_text(const std::string& text) {
  uint64_t hash = text.size();
  for (const char c : text) hash = mix(hash, static_cast<uint8_t>(c));
  return hash;
}

void write_header(const Arena& arena, const Identity& identity, uint64_t group, int pid) {
  auto* const header = new (arena.base()) RankHeader{};
  header->magic = kMagic;
  header->version = kProtocolVersion;
  header->rank = identity.rank;
  header->size = identity.size;
  header->pid = pid;
  header->generation = identity.generation;
  header->group = group;
  header->capacity = arena.capacity();
  header->state.store(static_cast<uint32_t>(RankState::kJoining), std::memory_order_release);
}

void check_header(const Peer& peer, int rank, const Identity& identity, uint64_t group) {
  const RankHeader& header = *peer.header();
  TPN_CHECK(header.magic == kMagic && header.version == kProtocolVersion && header.rank == rank &&
                header.size == identity.size && header.generation == identity.generation &&
                header.group == group && header.capacity == peer.mapping->bytes(),
            "the shared memory that rank ", rank, " sent is not its own arena of group ",
            identity.name, ": two jobs may be using the same address; start the job again");
}

HostCommunicator::HostCommunicator(Identity identity, std::shared_ptr<Arena> arena,
                                   std::vector<Peer> peers)
    : Communicator(std::move(identity)),
      arena_(std::move(arena)),
      peers_(std::move(peers)),
      group_hash_(mix(hash_text(identity_.name), identity_.generation)),
      spin_pauses_(spin_pauses(identity_.size)),
      log_(1024) {
  peers_[identity_.rank].header()->state.store(static_cast<uint32_t>(RankState::kActive),
                                               std::memory_order_release);
}

HostCommunicator::~HostCommunicator() {
  if (is_forked_child()) {
    (void)companion_.release();  // its thread does not exist here
    return;
  }
  close();
}

void HostCommunicator::close() {
  if (is_forked_child()) return;  // it would leave in its parent's name
  is_closing_.store(
      true, std::memory_order_release);  // sends a thread of ours that waits in a collective away
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(is_closed_, true)) return;
    peers_[identity_.rank].header()->state.store(static_cast<uint32_t>(RankState::kLeft),
                                                 std::memory_order_release);
    wake(identity_.rank);
  }
  companion_.reset();
}

Stats HostCommunicator::stats() const {
  std::lock_guard lock(mutex_);
  Stats stats = stats_;
  stats.arena_bytes_in_use = arena_->bytes_in_use();
  stats.arena_bytes_peak = arena_->bytes_peak();
  return stats;
}

std::vector<LogEntry> HostCommunicator::op_log() const {
  std::lock_guard lock(mutex_);
  std::vector<LogEntry> entries;
  const uint64_t kept = std::min<uint64_t>(seq_, log_.size());
  for (uint64_t seq = seq_ - kept + 1; seq <= seq_; ++seq)
    entries.push_back(log_[seq % log_.size()]);
  return entries;
}

bool HostCommunicator::has_left(int rank) const {
  return peers_[rank].header()->state.load(std::memory_order_acquire) ==
         static_cast<uint32_t>(RankState::kLeft);
}

// ---- announcing and waiting

void HostCommunicator::announce(uint64_t block) {
  Line& mine = line(identity_.rank);
  const Signature& s = *current_;
  const uint64_t signature_hash = hash_signature(s);
  mine.fingerprint = mix(mix(signature_hash, group_hash_), seq_);
  mine.block = block;
  mine.seq.store(seq_, std::memory_order_relaxed);
  mine.op.store(static_cast<uint8_t>(s.op), std::memory_order_relaxed);
  mine.dtype = static_cast<uint8_t>(s.dtype);
  mine.reduce = static_cast<uint8_t>(s.reduce);
  mine.root = static_cast<int8_t>(s.root);
  mine.dim = static_cast<int8_t>(s.dim);
  mine.dims = static_cast<uint8_t>(std::min<size_t>(s.shape.size(), kMaxDims));
  std::copy_n(s.shape.begin(), mine.dims, mine.shape);
  log_[seq_ % log_.size()] = {seq_, s.op, s.dtype, signature_hash};
  post();
}

HostCommunicator::Announced HostCommunicator::check_announced(int64_t shared_bytes) {
  Announced announced;
  const uint64_t expected = line(identity_.rank).fingerprint;
  for (int r = 0; r < identity_.size; ++r) {
    const Line& theirs = line(r);
    if (theirs.fingerprint != expected) [[unlikely]]
      raise_mismatch();
    const uint64_t block = announced.block[r] = theirs.block;
    if (block == kNoBlock) {
      announced.all_shared = false;
      continue;
    }
    announced.any_shared = true;
    const size_t capacity = peers_[r].mapping->bytes();
    if (block < kReservedBytes || block > capacity ||
        static_cast<uint64_t>(shared_bytes) > capacity - block) {
      fail_group(FailureKind::kError, r,
                 concat("rank ", r, " announced a block outside its arena"));
    }
  }
  return announced;
}

void HostCommunicator::post() {
  RankHeader& header = *peers_[identity_.rank].header();
  // seq_cst, with the sleeper's fetch_add: either it sees the tick or we see the sleeper
  header.lines[seq_ % kRing].tick.store(++tick_, std::memory_order_seq_cst);
  if (header.sleepers.load(std::memory_order_seq_cst) != 0) [[unlikely]]
    wake(identity_.rank);
}

void HostCommunicator::wake(int rank) const {
  for (Line& l : peers_[rank].header()->lines) {
    ::syscall(SYS_futex, futex_word(l.tick), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  }
}

void HostCommunicator::await_all(uint64_t tick) {
  for (int i = 1; i < identity_.size; ++i) await((identity_.rank + i) % identity_.size, tick);
}

void HostCommunicator::await(int rank, uint64_t tick) {
  const std::atomic<uint64_t>& theirs = line(rank).tick;
  for (int i = 0; i < 64; ++i) {
    if (theirs.load(std::memory_order_acquire) >= tick) [[likely]]
      return;
  }
  await_slow(rank, tick);
}

void HostCommunicator::await_slow(int rank, uint64_t tick) {
  const std::atomic<uint64_t>& theirs = line(rank).tick;
  const auto arrived = [&] { return theirs.load(std::memory_order_acquire) >= tick; };
  for (int i = 0; i < spin_pauses_; ++i) {
    if (arrived()) return;
    cpu_pause();
  }
  const double start = wait_started_s_ = now_s();
  double next_signals_s = 0.05;
  double next_warning_s = kWarnSeconds;
  double waited_s = 0;
  for (;;) {
    if (waited_s < kYieldSeconds) {
      for (int i = 0; i < 16; ++i) {
        if (arrived()) return;
        ::sched_yield();
      }
    } else {
      sleep_on(rank, tick);
    }
    if (arrived()) return;
    check_abort();
    if (is_closing_.load(std::memory_order_acquire)) {
      fail_group(FailureKind::kAborted, identity_.rank,
                 concat("rank ", identity_.rank,
                        " closed the group while one of its threads was in a collective"));
    }
    if (has_left(rank) && !arrived()) {
      fail_group(FailureKind::kPeerLost, rank, concat(describe_rank(rank), " left the group"));
    }
    waited_s = now_s() - start;
    if (waited_s >= next_signals_s) {
      next_signals_s = waited_s + 0.05;
      if (callbacks().check_signals) callbacks().check_signals();
    }
    check_deadline(rank, waited_s, next_warning_s);
  }
}

void HostCommunicator::sleep_on(int rank, uint64_t tick) {
  RankHeader& header = *peers_[rank].header();
  std::atomic<uint64_t>& theirs = line(rank).tick;
  header.sleepers.fetch_add(1, std::memory_order_seq_cst);  // pairs with post()
  const uint64_t seen = theirs.load(std::memory_order_seq_cst);
  if (seen < tick) {
    const timespec slice{0, kSliceNanoseconds};
    ::syscall(SYS_futex, futex_word(theirs), FUTEX_WAIT, static_cast<uint32_t>(seen), &slice,
              nullptr, 0);
  }
  header.sleepers.fetch_sub(1, std::memory_order_relaxed);
}

void HostCommunicator::check_deadline(int rank, double waited_s, double& next_warning_s) {
  if (waited_s >= timeout_s_) {
    fail_group(FailureKind::kTimeout, rank,
               concat(describe_rank(rank), " did not come within ", timeout_s_, " s; ",
                      late_table(tick_), "; raise timeout_s if it is only slow"));
  }
  if (waited_s >= next_warning_s) {
    next_warning_s += kWarnSeconds;
    warn(concat("rank ", identity_.rank, " has waited ", static_cast<int>(waited_s), " s in ",
                describe_current(), "; ", late_table(tick_)));
  }
}

// ---- failures

void HostCommunicator::check_not_forked() const {
  TPN_CHECK(!is_forked_child(), "group ", identity_.name,
            " was made before fork(): a forked child cannot use it; make the child before "
            "init_tensor_parallel(), or use spawn");
}

void HostCommunicator::check_usable() {
  if (failure_) raise(*failure_);
  TPN_CHECK(!is_closed_ && !is_closing_.load(std::memory_order_acquire), "group ", identity_.name,
            " is closed: call init_tensor_parallel() again");
  check_abort();
}

void HostCommunicator::check_abort() {
  AbortRecord& record = abort_record();
  if (record.state.load(std::memory_order_acquire) == AbortRecord::kFree) [[likely]]
    return;
  const double start = now_s();  // the claimer may die before it publishes
  while (record.state.load(std::memory_order_acquire) == AbortRecord::kClaimed &&
         now_s() - start < 0.05)
    ::sched_yield();
  if (record.state.load(std::memory_order_acquire) != AbortRecord::kPublished) {
    raise_failure(FailureKind::kAborted, -1,
                  "a rank aborted the group and died before it said why");
  }
  char text[kAbortTextBytes];
  std::memcpy(text, record.text, sizeof(text));
  text[sizeof(text) - 1] = '\0';
  const int culprit = record.culprit;
  raise_failure(static_cast<FailureKind>(record.kind), culprit < identity_.size ? culprit : -1,
                text);
}

void HostCommunicator::publish_abort(FailureKind kind, int culprit,
                                     const std::string& text) noexcept {
  AbortRecord& record = abort_record();
  uint32_t free = AbortRecord::kFree;
  if (!record.state.compare_exchange_strong(free, AbortRecord::kClaimed, std::memory_order_acq_rel))
    return;
  record.kind = static_cast<uint8_t>(kind);
  record.culprit = culprit;
  record.reporter = identity_.rank;
  std::snprintf(record.text, sizeof(record.text), "%s", text.c_str());
  record.state.store(AbortRecord::kPublished, std::memory_order_release);
  for (int r = 0; r < identity_.size; ++r) wake(r);
}

void HostCommunicator::abort(const std::string& reason) {
  if (is_forked_child()) return;
  publish_abort(FailureKind::kAborted, identity_.rank,
                concat("rank ", identity_.rank, " aborted the group: ", reason));
}

void HostCommunicator::fail_group(FailureKind kind, int culprit, const std::string& text) {
  publish_abort(kind, culprit, text);
  check_abort();  // whoever was first is what all ranks report
  raise_failure(kind, culprit, text);
}

void HostCommunicator::raise_failure(FailureKind kind, int culprit, const std::string& text) {
  FailureRecord record;
  record.kind = kind;
  record.rank = identity_.rank;
  record.peer = culprit;
  record.op = current_ ? name(current_->op) : "no operation";
  record.seq = seq_;
  record.elapsed_s = wait_started_s_ > 0 ? now_s() - wait_started_s_ : 0;
  record.message = current_
                       ? concat("rank ", identity_.rank, " in ", describe_current(), ": ", text)
                       : concat("rank ", identity_.rank, " of group ", identity_.name, ": ", text);
  if (kind != FailureKind::kError)
    record.message += "; the group is unusable now, start its ranks again";
  failure_ = record;
  arena_->retire();
  raise(std::move(record));
}

void HostCommunicator::raise_mismatch() {
  int votes_best = 0;
  int model = 0;  // the rank whose operation most ranks share; of equals the lowest
  for (int r = 0; r < identity_.size; ++r) {
    int votes = 0;
    for (int other = 0; other < identity_.size; ++other)
      votes += line(other).fingerprint == line(r).fingerprint;
    if (votes > votes_best) {
      votes_best = votes;
      model = r;
    }
  }
  int culprit = -1;
  std::ostringstream text;
  text << "the ranks entered different collectives:";
  for (int r = 0; r < identity_.size; ++r) {
    const Line& l = line(r);
    if (culprit < 0 && l.fingerprint != line(model).fingerprint) culprit = r;
    const size_t dims = std::min<size_t>(l.dims, kMaxDims);
    text << (r ? "; " : " ") << "rank " << r << " "
         << describe(l.op.load(std::memory_order_relaxed), l.dtype, l.reduce, l.root, l.dim,
                     std::span(l.shape, dims));
  }
  text
      << ". All ranks must call the same operation with the same dtype, global shape and partition";
  fail_group(FailureKind::kMismatch, culprit, text.str());
}

std::string HostCommunicator::describe_rank(int rank) const {
  return concat("rank ", rank, " (pid ", peers_[rank].header()->pid, ")");
}

std::string HostCommunicator::describe_current() const {
  const Signature& s = *current_;
  return concat(describe(static_cast<uint8_t>(s.op), static_cast<uint8_t>(s.dtype),
                         static_cast<uint8_t>(s.reduce), s.root, s.dim, s.shape),
                " #", seq_);
}

std::string HostCommunicator::late_table(uint64_t tick) const {
  std::ostringstream text;
  text << "ranks:";
  for (int r = 0; r < identity_.size; ++r) {
    const Line* last = nullptr;
    uint64_t last_seq = 0;
    for (const Line& l : peers_[r].header()->lines) {
      const uint64_t seq = l.seq.load(std::memory_order_relaxed);
      if (seq > last_seq) {
        last = &l;
        last_seq = seq;
      }
    }
    text << (r ? ", " : " ") << r;
    if (has_left(r)) text << " left";
    if (!last) {
      text << " has called nothing yet";
    } else {
      text << (last->tick.load(std::memory_order_acquire) >= tick ? " is in " : " last called ")
           << name(static_cast<OpCode>(last->op.load(std::memory_order_relaxed))) << " #"
           << last_seq;
    }
  }
  return text.str();
}

}  // namespace tp_native::comm
