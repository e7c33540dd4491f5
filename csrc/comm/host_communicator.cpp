// SPDX-License-Identifier: Apache-2.0
// Life, announcements, waits and failures. The collectives themselves are in host_collectives.cpp.
#include "comm/host_communicator.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <thread>

#include "core/callbacks.h"
#include "core/fault.h"

namespace tp_native::comm {
namespace {

constexpr double kYieldSeconds = 1e-3;  // a peer between two operations is usually back within this
constexpr long kSliceNanoseconds =
    20'000'000;  // a lost wake-up or a signal costs one slice at most
constexpr double kWarnSeconds = 30;
constexpr double kNoteSeconds = 0.05;
constexpr double kRecordSeconds = 1;  // a record is written in milliseconds, unless the disk hangs
constexpr double kWarmUpSeconds = 0.25;   // first steps touch new memory: nobody is slow yet
constexpr double kPromptSeconds = 50e-6;  // who comes within this is not called slow

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

/// Pauses before the first yield. Few even where every rank has a core: the scheduler may put two
/// ranks on one for a while, and then each hop costs the whole spin.
int spin_pauses(int size) {
  cpu_set_t set;
  const int allowed = ::sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  const bool is_pinned = allowed == 1;  // one core each, presumably
  return is_pinned || size <= allowed ? 400 : 20;
}

}  // namespace

void write_header(const Arena& arena, const Identity& identity, uint64_t group, int pid,
                  const std::string& offer) {
  auto* const header = new (arena.base()) RankHeader{};
  header->magic = kMagic;
  header->version = kProtocolVersion;
  header->rank = identity.rank;
  header->size = identity.size;
  header->pid = pid;
  header->group = group;
  header->capacity = arena.capacity();
  copy_text(header->offer, offer);
  header->state.store(static_cast<uint32_t>(RankState::kJoining), std::memory_order_release);
}

void check_header(const Peer& peer, int rank, const Identity& identity, uint64_t group) {
  const RankHeader& header = *peer.header();
  TPN_CHECK(header.magic == kMagic && header.version == kProtocolVersion && header.rank == rank &&
                header.size == identity.size && header.group == group &&
                header.capacity == peer.mapping->bytes(),
            "the shared memory that rank ", rank, " sent is not its own arena of group ",
            identity.name, ": two jobs may be using the same address; start the job again");
}

HostCommunicator::HostCommunicator(Identity identity, std::shared_ptr<Arena> arena,
                                   std::vector<Peer> peers, bool is_checked)
    : Communicator(std::move(identity)),
      is_checked_(is_checked),
      arena_(std::move(arena)),
      peers_(std::move(peers)),
      group_hash_(mix(hash_text(identity_.name), identity_.generation)),
      spin_pauses_(spin_pauses(identity_.size)) {
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
  if (is_reentered())
    return;  // the wait below this handler ends the group; then close() comes again
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(is_closed_, true)) return;
    TPN_FAULT("leave");
    // proof: leave
    peers_[identity_.rank].header()->state.store(static_cast<uint32_t>(RankState::kLeft),
                                                 std::memory_order_release);
    wake(identity_.rank);
  }
  companion_.reset();
}

Stats HostCommunicator::stats() const {
  constexpr auto kRelaxed = std::memory_order_relaxed;
  Stats stats;
  stats.collectives = collectives_.load(kRelaxed);
  stats.bytes = bytes_.load(kRelaxed);
  stats.staged = staged_.load(kRelaxed);
  stats.arena_bytes_in_use = arena_->bytes_in_use();
  stats.arena_bytes_peak = arena_->bytes_peak();
  for (int r = 0; r < identity_.size; ++r)
    stats.late_share.push_back(late_share_[r].load(kRelaxed));
  return stats;
}

std::vector<LogEntry> HostCommunicator::op_log() const {
  std::vector<LogEntry> entries;
  for (const FlightCopy& e : all_flight(flight_of(identity_.rank)))
    entries.push_back({e.seq, e.op, e.dtype, e.signature});
  return entries;
}

std::vector<RankHeader*> HostCommunicator::headers() const {
  std::vector<RankHeader*> all;
  for (const Peer& peer : peers_) all.push_back(peer.header());
  return all;
}

std::string HostCommunicator::left_text(int rank) const {
  return concat(describe_rank(rank), " left the group");
}

void HostCommunicator::beat() noexcept {
  std::atomic<uint64_t>& pulse = peers_[identity_.rank].header()->pulse;
  pulse.store(pulse.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

uint64_t HostCommunicator::beats(int rank) const {
  return peers_[rank].header()->pulse.load(std::memory_order_relaxed);
}

std::string HostCommunicator::offer(int rank) const {
  const char* const text = peers_[rank].header()->offer;
  return {text, ::strnlen(text, kOfferBytes)};
}

bool HostCommunicator::has_left(int rank) const {
  return peers_[rank].header()->state.load(std::memory_order_acquire) ==
         static_cast<uint32_t>(RankState::kLeft);
}

// ---- announcing and waiting

void HostCommunicator::announce(uint64_t block) {  // proof: meet.announce
  TPN_FAULT("announce");
  Line& mine = line(identity_.rank);
  const uint64_t now = is_checked_ ? stamp() : 0;
  if (is_checked_) {
    signature_hash_ = hash_signature(*current_);
    mine.fingerprint = mix(mix(signature_hash_, group_hash_), seq_);
  }
  mine.block = block;
  mine.stamp = now;
  post();
  if (is_checked_) {  // while the line travels
    chain_ = mix(chain_, signature_hash_);
    begin_flight(flight_of(identity_.rank), seq_, *current_, signature_hash_, chain_, bytes_now_,
                 now);
    note_arrivals();
  }
  TPN_FAULT("announced");
}

HostCommunicator::Announced HostCommunicator::check_announced(int64_t shared_bytes) {
  TPN_FAULT("check");
  Announced announced;
  const uint64_t expected = line(identity_.rank).fingerprint;
  for (int r = 0; r < identity_.size; ++r) {  // proof: meet.check
    const Line& theirs = line(r);
    if (theirs.fingerprint != expected) [[unlikely]]
      raise_mismatch();
    arrived_[r] = theirs.stamp;
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

/// Of the last collective.
void HostCommunicator::note_arrivals() {
  if (arrived_[0] == 0) return;
  if (!skew_.has_floor() && clock_.age_s() > kWarmUpSeconds) [[unlikely]]
    skew_.set_floor(static_cast<uint64_t>(kPromptSeconds / clock_.period_s()));
  const int slow = skew_.add(arrived_, identity_.size);
  for (int r = 0; r < identity_.size; ++r)
    late_share_[r].store(static_cast<float>(skew_.share(r)), std::memory_order_relaxed);
  if (slow >= 0) [[unlikely]]
    warn_of_straggler(slow);
}

void HostCommunicator::warn_of_straggler(int rank) const {
  if (identity_.rank != 0) return;  // all ranks see it; one tells
  warn(concat("group ", identity_.name, ": ", describe_rank(rank), " is slow: the others spend ",
              static_cast<int>(skew_.share(rank) * 100), " % of the time waiting for it, now in ",
              describe_current()));
}

void HostCommunicator::post() {
  RankHeader& header = *peers_[identity_.rank].header();
  // seq_cst, with the sleeper's fetch_add: either it sees the tick or we see the sleeper
  header.lines[meets_ % kRing].tick.store(++tick_, std::memory_order_seq_cst);  // proof: meet.post
  if (header.sleepers.load(std::memory_order_seq_cst) != 0) [[unlikely]]        // proof: sleep.ask
    wake(identity_.rank);
}

void HostCommunicator::wake(int rank) const {
  for (Line& l : peers_[rank].header()->lines) {  // proof: sleep.wake
    ::syscall(SYS_futex, futex_word(l.tick), FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
  }
}

void HostCommunicator::await_all(uint64_t tick) {
  TPN_FAULT("await");
  for (int i = 1; i < identity_.size; ++i) await((identity_.rank + i) % identity_.size, tick);
}

void HostCommunicator::await(int rank, uint64_t tick) {
  const std::atomic<uint64_t>& theirs = line(rank).tick;
  for (int i = 0; i < 64; ++i) {  // proof: meet.await
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
    if (has_left(rank) && !arrived()) {  // proof: leave.observe
      fail_group(FailureKind::kPeerLost, rank, left_text(rank));
    }
    waited_s = now_s() - start;
    if (waited_s >= next_signals_s) {
      next_signals_s = waited_s + 0.05;
      if (callbacks().check_signals) {
        is_interrupted_ = true;  // if it throws
        callbacks().check_signals();
        is_interrupted_ = false;
      }
    }
    check_deadline(rank, waited_s, next_warning_s);
  }
}

void HostCommunicator::sleep_on(int rank, uint64_t tick) {
  TPN_FAULT("sleep");
  RankHeader& header = *peers_[rank].header();
  std::atomic<uint64_t>& theirs = line(rank).tick;
  header.sleepers.fetch_add(1, std::memory_order_seq_cst);       // proof: sleep.register
  const uint64_t seen = theirs.load(std::memory_order_seq_cst);  // proof: sleep.recheck
  if (seen < tick) {
    const timespec slice{0, kSliceNanoseconds};  // proof: sleep.slice, sleep.wait
    ::syscall(SYS_futex, futex_word(theirs), FUTEX_WAIT, static_cast<uint32_t>(seen), &slice,
              nullptr, 0);
  }
  header.sleepers.fetch_sub(1, std::memory_order_relaxed);  // proof: sleep.unregister
}

void HostCommunicator::check_deadline(int rank, double waited_s, double& next_warning_s) {
  if (waited_s >= timeout_s_) {  // proof: meet.deadline
    fail_group(FailureKind::kTimeout, rank,
               concat(describe_rank(rank), " did not come within ", timeout_s_, " s; ",
                      late_table(), "; raise timeout_s if it is only slow"));
  }
  if (waited_s >= next_warning_s) {
    next_warning_s += kWarnSeconds;
    warn(concat("rank ", identity_.rank, " has waited ", static_cast<int>(waited_s), " s in ",
                describe_current(), "; ", late_table()));
  }
}

// ---- operations that run elsewhere

uint64_t HostCommunicator::note(const Signature& signature, int64_t bytes) {
  check_not_forked();
  std::lock_guard lock(mutex_);
  check_usable();
  const uint64_t hash = hash_signature(signature);
  chain_ = mix(chain_, hash);
  begin_flight(flight_of(identity_.rank), ++seq_, signature, hash, chain_, bytes, stamp());
  return seq_;
}

void HostCommunicator::finish(uint64_t seq) noexcept { end_flight(flight_of(identity_.rank), seq); }

std::optional<Mismatch> HostCommunicator::compare() {
  const FlightRing* rings[kMaxRanks];
  for (int r = 0; r < identity_.size; ++r) rings[r] = &flight_of(r);
  return compare_flights(std::span(rings, static_cast<size_t>(identity_.size)), compared_);
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
  check_abort();  // proof: abort.check_usable
}

void HostCommunicator::check_abort() {  // proof: abort.observe
  if (const std::optional<Verdict> held = verdict()) [[unlikely]]
    raise_failure(held->kind, held->culprit, held->text);
}

std::optional<Verdict> HostCommunicator::verdict() const {
  const uint32_t word = peers_[0].header()->verdict.load(std::memory_order_acquire);
  if (word == 0) [[likely]]
    return std::nullopt;
  const int judge = static_cast<int>(word) - 1;
  if (judge >= identity_.size)
    return Verdict{FailureKind::kAborted, -1, "a rank aborted the group"};
  const AbortRecord& record = peers_[judge].header()->abort;
  char text[kAbortTextBytes];
  std::memcpy(text, record.text, sizeof(text));
  text[sizeof(text) - 1] = '\0';
  const int culprit = record.culprit;
  const uint8_t kind = record.kind;
  return Verdict{kind <= static_cast<uint8_t>(FailureKind::kInterrupted)
                     ? static_cast<FailureKind>(kind)
                     : FailureKind::kError,
                 culprit < identity_.size ? culprit : -1, text};
}

void HostCommunicator::publish_abort(FailureKind kind, int culprit,
                                     const std::string& text) noexcept {
  std::atomic<uint32_t>& verdict = peers_[0].header()->verdict;
  {
    std::lock_guard lock(abort_mutex_);  // the watch reports too
    if (verdict.load(std::memory_order_acquire) != 0) return;
    AbortRecord& mine = peers_[identity_.rank].header()->abort;  // proof: abort.publish
    mine.kind = static_cast<uint8_t>(kind);
    mine.culprit = culprit;
    copy_text(mine.text, text);
    TPN_FAULT("abort.publish");
    is_recording_.store(kind != FailureKind::kInterrupted, std::memory_order_relaxed);
    uint32_t none = 0;  // proof: abort.claim
    if (!verdict.compare_exchange_strong(none, static_cast<uint32_t>(identity_.rank) + 1,
                                         std::memory_order_acq_rel)) {
      is_recording_.store(false, std::memory_order_relaxed);
      return;
    }
  }
  for (int r = 0; r < identity_.size; ++r) wake(r);
  if (kind != FailureKind::kInterrupted)
    write_flight_record(identity_, headers(), kind, culprit, text, clock_);
  is_recording_.store(false, std::memory_order_release);  // flight_hint() waits for it
}

void HostCommunicator::abort(const std::string& reason) {
  if (is_forked_child()) return;
  publish_abort(FailureKind::kAborted, identity_.rank,
                concat("rank ", identity_.rank, " aborted the group: ", reason));
}

void HostCommunicator::check() {
  check_not_forked();
  if (is_reentered()) return;
  std::lock_guard lock(mutex_);
  wait_started_s_ = 0;
  check_usable();
  for (int r = 0; r < identity_.size; ++r) {
    if (has_left(r)) fail_group(FailureKind::kPeerLost, r, left_text(r));
  }
}

void HostCommunicator::fail_group(FailureKind kind, int culprit, const std::string& text) {
  publish_abort(kind, culprit, text);
  check_abort();  // whoever was first is what all ranks report
  raise_failure(kind, culprit, text);
}

FailureRecord HostCommunicator::failure_record(FailureKind kind, int culprit,
                                               const std::string& text) const {
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
    record.message += "; the group is unusable now: start its ranks again, or renew() it";
  if (kind != FailureKind::kInterrupted) record.message += flight_hint();
  return record;
}

std::string HostCommunicator::flight_hint() const {
  const std::string path = flight_path(identity_, *peers_[0].header());
  // the watch may be writing it still, and a process that ends now would take the record with it
  for (const double end_s = now_s() + kRecordSeconds;
       is_recording_.load(std::memory_order_acquire) && now_s() < end_s;)
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  return path.empty() ? path : concat("; flight record: ", path, " (tp-native blame ", path, ")");
}

void HostCommunicator::raise_failure(FailureKind kind, int culprit, const std::string& text) {
  failure_ = failure_record(kind, culprit, text);
  arena_->retire();  // proof: abort.retire
  raise(*failure_);
}

void HostCommunicator::raise_mismatch() {
  const auto size = static_cast<size_t>(identity_.size);
  FlightCopy entries[kMaxRanks];
  Announcement ranks[kMaxRanks];
  const double start = now_s();
  for (int r = 0; r < identity_.size; ++r) {
    do {  // a rank notes its operation right after it has announced it
      entries[r] = copy_flight(flight_of(r), seq_);
    } while (entries[r].seq == 0 && !verdict() && now_s() - start < kNoteSeconds &&
             ::sched_yield() == 0);
    ranks[r] = announcement_of(entries[r], line(r).fingerprint);
  }
  const Mismatch found = find_mismatch(std::span(ranks, size));
  fail_group(FailureKind::kMismatch, found.culprit, found.text);
}

std::string HostCommunicator::describe_rank(int rank) const {
  return concat("rank ", rank, " (pid ", peers_[rank].header()->pid, ")");
}

std::string HostCommunicator::describe_current() const {
  return concat(describe(*current_), " #", seq_);
}

std::string HostCommunicator::describe_last(int rank) const {
  const FlightCopy last = last_flight(flight_of(rank));
  if (last.seq == 0) return "before its first operation";
  return concat(last.end == 0 ? "in " : "after ", describe(announcement_of(last)), " #", last.seq);
}

std::string HostCommunicator::late_table() const {
  std::ostringstream text;
  text << "ranks:";
  for (int r = 0; r < identity_.size; ++r) {
    const FlightCopy last = last_flight(flight_of(r));
    text << (r ? ", " : " ") << r;
    if (has_left(r)) text << " left";
    if (last.seq == 0) {
      text << " has called nothing yet";
    } else {
      text << (last.seq >= seq_ ? " is in " : " last called ") << name(last.op) << " #" << last.seq;
    }
  }
  return text.str();
}

}  // namespace tp_native::comm
