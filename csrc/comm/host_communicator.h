// SPDX-License-Identifier: Apache-2.0
// The collectives of ranks that reach each other's arenas: processes (shm) or threads (local). Who
// they are and how their memory was mapped is the business of shm.cpp and local.cpp.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "comm/arena.h"
#include "comm/board.h"
#include "comm/busy_thread.h"
#include "comm/communicator.h"
#include "comm/flight.h"
#include "comm/protocol.h"
#include "comm/skew.h"
#include "core/clock.h"
#include "core/error.h"

namespace tp_native::comm {

struct Peer {
  std::shared_ptr<Mapping> mapping;
  RankHeader* header() const { return reinterpret_cast<RankHeader*>(mapping->base()); }
};

/// Something that lives as long as the communicator and is stopped before it goes: the watch over
/// the peers.
class Companion {
 public:
  virtual ~Companion() = default;
};

/// Fills in a fresh arena's header, state kJoining.
void write_header(const Arena& arena, const Identity& identity, uint64_t group, int pid,
                  const std::string& offer = {});
/// Raises unless `peer`'s header is that of rank `rank` of this group.
void check_header(const Peer& peer, int rank, const Identity& identity, uint64_t group);

class HostCommunicator final : public Communicator {
 public:
  /// `peers[r]` is rank r's mapping, this rank's own included.
  HostCommunicator(Identity identity, std::shared_ptr<Arena> arena, std::vector<Peer> peers,
                   bool is_checked = true);
  ~HostCommunicator() override;

  Block allocate(int64_t bytes) override;
  void all_reduce(const Signature&, const void* in, void* out, int64_t count, const Epilogue&,
                  Stream) override;
  void all_gather(const Signature&, const void* in, void* out, int64_t rows,
                  std::span<const int64_t> columns, Stream) override;
  void reduce_scatter(const Signature&, const void* in, void* out, std::span<const int64_t> counts,
                      Stream) override;
  void gather(const Signature&, const void* in, void* out, std::span<const int64_t> counts,
              Stream) override;
  void scatter(const Signature&, const void* in, void* out, std::span<const int64_t> counts,
               Stream) override;
  void broadcast(const Signature&, void* data, int64_t count, Stream) override;
  void barrier(double timeout_s, Stream) override;
  void abort(const std::string& reason) override;
  void check() override;
  void close() override;
  Stats stats() const override;
  std::vector<LogEntry> op_log() const override;
  std::optional<FailureRecord> failure() const override {
    std::lock_guard lock(mutex_);
    return failure_;
  }

  /// Claims the group's abort record unless somebody has; wakes every sleeper. Safe from any
  /// thread.
  void publish_abort(FailureKind kind, int culprit, const std::string& text) noexcept;
  std::optional<Verdict> verdict() const;
  std::string offer(int rank) const;
  bool has_left(int rank) const;
  void beat() noexcept;  ///< this rank lives
  uint64_t beats(int rank) const;
  /// Numbers and notes this rank's next operation, which runs elsewhere, without waiting. Raises if
  /// the group has failed.
  uint64_t note(const Signature& signature, int64_t bytes);
  void finish(uint64_t seq) noexcept;  ///< a noted operation has ended
  /// What differs in the ranks' notes, as far as all of them have come; asks nobody. One thread.
  std::optional<Mismatch> compare();
  /// This rank's operations so far.
  uint64_t noted() const { return flight_of(identity_.rank).noted.load(std::memory_order_acquire); }
  FlightCopy last(int rank) const { return last_flight(flight_of(rank)); }
  std::string flight_hint() const;  ///< "; flight record: FILE ...", or nothing
  /// "in all_reduce(sum, float32 [4]) #17", "after ...", "before its first operation"
  std::string describe_last(int rank) const;
  void keep(std::unique_ptr<Companion> companion) { companion_ = std::move(companion); }

 private:
  struct Announced {
    bool any_shared = false;
    bool all_shared = true;
    uint64_t block[kMaxRanks];  ///< checked copies of the peers' offsets
  };

  template <class Body>
  void collective(const Signature& signature, int64_t bytes, double timeout_s, Body&& body);
  template <class Put, class Take>
  void staged(int64_t most, int64_t chunk_bytes, const Put& put, const Take& take);
  template <class Put, class Take>
  void pipeline(int64_t chunks, uint64_t first_tick, const bool* late, const Put& put,
                const Take& take);
  void reduce_shared(const Signature&, const Announced&, void* out, int64_t count, const Epilogue&);
  void reduce_staged(const Signature&, const void* in, void* out, int64_t count, const Epilogue&,
                     bool is_shared);
  void reduce_alone(const Signature&, const void* in, void* out, int64_t count,
                    const Epilogue&) const;

  Line& line(int rank) const { return peers_[rank].header()->lines[meets_ % kRing]; }
  static void bump(std::atomic<uint64_t>& counter, uint64_t by) {  // one writer: no locked add
    counter.store(counter.load(std::memory_order_relaxed) + by, std::memory_order_relaxed);
  }
  FlightRing& flight_of(int rank) const { return peers_[rank].header()->flight; }
  char* slot(int rank, uint64_t chunk) const;
  std::vector<RankHeader*> headers() const;
  void announce(uint64_t block);
  Announced check_announced(int64_t shared_bytes);
  void post();
  void await(int rank, uint64_t tick);
  void await_all(uint64_t tick);
  void await_slow(int rank, uint64_t tick);
  void sleep_on(int rank, uint64_t tick);

  void check_not_forked() const;
  void check_usable();
  void check_abort();
  [[noreturn]] void fail_group(FailureKind kind, int culprit, const std::string& text);
  FailureRecord failure_record(FailureKind kind, int culprit, const std::string& text) const;
  [[noreturn]] void raise_failure(FailureKind kind, int culprit, const std::string& text);
  [[noreturn]] void raise_mismatch();
  void check_deadline(int rank, double waited_s, double& next_warning_s);
  std::string describe_rank(int rank) const;
  std::string left_text(int rank) const;
  std::string describe_current() const;
  void note_arrivals();
  void warn_of_straggler(int rank) const;
  std::string late_table() const;
  void wake(int rank) const;
  bool is_reentered() const { return busy_thread_.is_this(); }  ///< by a signal handler
  bool is_forked_child() const { return arena_->mapping()->owner().is_elsewhere(); }

  const bool is_checked_;  ///< false only where the cost of the checks is measured
  std::shared_ptr<Arena> arena_;
  std::vector<Peer> peers_;
  std::unique_ptr<Companion> companion_;
  uint64_t group_hash_;
  int spin_pauses_;
  StampClock clock_;

  std::atomic<bool> is_recording_{false};  ///< a thread of this rank writes the flight record
  std::mutex abort_mutex_;    ///< guards this rank's abort record until a verdict is passed
  mutable std::mutex mutex_;  ///< one collective of this rank at a time; guards what follows
  const Signature* current_ = nullptr;
  BusyThread busy_thread_;  ///< who holds the mutex for a collective
  uint64_t signature_hash_ = 0;
  int64_t bytes_now_ = 0;             ///< of the current operation, this rank's
  uint64_t arrived_[kMaxRanks] = {};  ///< stamps of the last collective
  bool is_inline_ = false;            ///< the current payload rides in the announcing line
  double timeout_s_ = 0;
  double wait_started_s_ = 0;
  uint64_t seq_ = 0;    ///< operations, those that were only noted too
  uint64_t meets_ = 0;  ///< those in which the ranks met
  uint64_t chain_ = 0;  ///< hash of all signatures so far
  uint64_t tick_ = 0;
  uint64_t chunk_ = 0;
  std::optional<FailureRecord> failure_;
  Skew skew_;

  // written under the mutex, read without it
  std::atomic<uint64_t> collectives_{0};
  std::atomic<uint64_t> bytes_{0};
  std::atomic<uint64_t> staged_{0};
  std::atomic<float> late_share_[kMaxRanks] = {};
  std::atomic<bool> is_closing_{false};
  bool is_interrupted_ = false;  ///< a signal handler raised; guarded by the mutex
  bool is_closed_ = false;
  uint64_t compared_ = 0;  ///< compare()'s: notes up to here are equal on all ranks
};

}  // namespace tp_native::comm
