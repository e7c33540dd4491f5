// SPDX-License-Identifier: Apache-2.0
#include "comm/socket_board.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "comm/board_communicator.h"
#include "core/clock.h"

namespace tp_native::comm {
namespace {

constexpr uint64_t kRecordMagic = 0x3165'746f'6e6e'7074;  // "tpnnote1", little endian
constexpr size_t kBatch = 64;                             // records in one system call
constexpr int kReads = 64;  // at most so many batches from a peer in one look
constexpr double kGoodbyeSeconds = 0.2;

enum class Kind : uint8_t { kNote = 1, kLeft = 2, kVerdict = 3 };

}  // namespace

/// Ranks have one byte order: NCCL asks for that too.
struct SocketBoard::Record {
  uint64_t magic = kRecordMagic;
  uint64_t seq = 0;
  uint64_t signature = 0;
  uint64_t chain = 0;
  uint64_t bytes = 0;
  int64_t shape[kMaxDims] = {};
  Kind kind = Kind::kNote;
  uint8_t op = 0;
  uint8_t dtype = 0;
  uint8_t reduce = 0;
  int8_t root = -1;
  int8_t dim = -1;
  uint8_t dims = 0;
  uint8_t unused = 0;
  uint64_t check = 0;  ///< of all that is before it

  uint64_t expected_check() const {
    uint64_t words[sizeof(Record) / sizeof(uint64_t) - 1];
    std::memcpy(words, this, sizeof(words));
    uint64_t hash = 0;
    for (const uint64_t word : words) hash = mix(hash, word);
    return hash;
  }
};

struct SocketBoard::Link {
  int rank = -1;
  Fd socket;
  bool is_open = false;  ///< more may come
  bool can_send = false;
  bool has_left = false;
  std::vector<char> out;  ///< not sent yet from `begun` on
  size_t begun = 0;
  std::vector<char> in;  ///< the beginning of a record
};

SocketBoard::SocketBoard(std::shared_ptr<Board> inner, int rank, std::vector<Fd> sockets)
    : inner_(std::move(inner)), rank_(rank), rings_(sockets.size()) {
  static_assert(sizeof(Record) == 104 && std::is_trivially_copyable_v<Record>);
  for (size_t r = 0; r < sockets.size(); ++r) {
    const bool is_own = static_cast<int>(r) == rank_;
    if (rank_ == 0 || is_own) rings_[r] = std::make_unique<FlightRing>();
    const bool is_linked = !is_own && (rank_ == 0 || r == 0);
    TPN_CHECK(static_cast<bool>(sockets[r]) == is_linked, "rank ", rank_, " got ",
              sockets[r] ? "a" : "no", " socket to rank ", r,
              ": rank 0 has one to each rank, the others one to rank 0");
    if (!is_linked) continue;
    Link& link = links_.emplace_back();
    link.rank = static_cast<int>(r);
    link.socket = std::move(sockets[r]);
    link.is_open = link.can_send = true;
  }
}

SocketBoard::~SocketBoard() { leave(); }

void SocketBoard::set_status(OpCode op, uint64_t seq, bool is_inside) {
  if (op != OpCode::kBarrier) inner_->set_status(op, seq, is_inside);
}

void SocketBoard::note(const Signature& signature, uint64_t seq, int64_t bytes) {
  const uint64_t hash = hash_signature(signature);
  chain_ = mix(chain_, hash);
  begin_flight(own(), seq, signature, hash, chain_, bytes, stamp());
}

void SocketBoard::finish(uint64_t seq) noexcept {
  end_flight(own(), seq);
  inner_->finish(seq);
}

void SocketBoard::look() {
  if (owner_.is_elsewhere()) return;
  std::optional<Verdict> found;
  {
    std::lock_guard lock(mutex_);
    if (has_left_) return;
    found = exchange();
  }
  if (!found || inner_->verdict()) return;
  inner_->claim(*found);  // it may wait for the store: not under the lock
  std::lock_guard lock(mutex_);
  for (Link& link : links_) {
    queue(link, {.kind = Kind::kVerdict});
    send(link);
  }
}

/// Sends and takes what is there; returns what is wrong.
std::optional<Verdict> SocketBoard::exchange() {
  found_.reset();
  for (Link& link : links_) {
    queue_notes(link);
    send(link);
    receive(link);
  }
  if (found_ || rank_ != 0) return found_;
  std::vector<const FlightRing*> rings;
  for (const auto& ring : rings_) rings.push_back(ring.get());
  if (const auto mismatch = compare_flights(rings, compared_))
    found_ = {FailureKind::kMismatch, mismatch->culprit, mismatch->text};
  return found_;
}

// ---- sending

void SocketBoard::queue(Link& link, const Record& record) {
  if (!link.can_send) return;
  Record checked = record;
  checked.check = checked.expected_check();
  const char* const from = reinterpret_cast<const char*>(&checked);
  link.out.insert(link.out.end(), from, from + sizeof(checked));
}

/// The next notes for rank 0, once what was queued before is gone: a peer that does not read costs
/// a batch of memory, and then notes, whose chain still tells.
void SocketBoard::queue_notes(Link& link) {
  if (rank_ == 0 || !link.out.empty()) return;
  const uint64_t last = own().noted.load(std::memory_order_acquire);
  sent_ = std::max(sent_, last - std::min(last, kFlightEntries));
  while (sent_ < last && link.out.size() < kBatch * sizeof(Record)) {
    const FlightCopy note = copy_flight(own(), ++sent_);
    if (note.seq == 0) continue;  // overwritten meanwhile, or of the time before this board
    Record record{.seq = note.seq,
                  .signature = note.signature,
                  .chain = note.chain,
                  .bytes = note.bytes,
                  .op = static_cast<uint8_t>(note.op),
                  .dtype = static_cast<uint8_t>(note.dtype),
                  .reduce = static_cast<uint8_t>(note.reduce),
                  .root = static_cast<int8_t>(note.root),
                  .dim = static_cast<int8_t>(note.dim),
                  .dims = static_cast<uint8_t>(note.shape.size())};
    std::ranges::copy(note.shape, record.shape);
    queue(link, record);
  }
}

/// What is queued and what follows it, as far as the socket takes it.
void SocketBoard::send(Link& link) {
  while (!link.out.empty() && link.can_send) {
    const ssize_t n = ::send(link.socket.get(), link.out.data() + link.begun,
                             link.out.size() - link.begun, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (n < 0) {  // receive() tells why
      link.can_send = false;
      return;
    }
    link.begun += static_cast<size_t>(n);
    if (link.begun < link.out.size()) continue;
    link.out.clear();
    link.begun = 0;
    queue_notes(link);
  }
}

// ---- receiving

void SocketBoard::receive(Link& link) {
  char buffer[kBatch * sizeof(Record)];
  for (int i = 0; i < kReads && link.is_open; ++i) {
    const ssize_t n = ::recv(link.socket.get(), buffer, sizeof(buffer), MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (n <= 0) {
      link.is_open = false;
      if (!link.has_left && !found_)
        found_ = {FailureKind::kPeerLost, link.rank,
                  concat("rank ", link.rank, " died or lost its network")};
      return;
    }
    link.in.insert(link.in.end(), buffer, buffer + n);
    size_t done = 0;
    for (; link.in.size() - done >= sizeof(Record) && link.is_open; done += sizeof(Record)) {
      Record record;
      std::memcpy(&record, link.in.data() + done, sizeof(record));
      take(link, record);
    }
    link.in.erase(link.in.begin(), link.in.begin() + static_cast<std::ptrdiff_t>(done));
  }
}

void SocketBoard::take(Link& link, const Record& r) {
  const bool is_whole = r.magic == kRecordMagic && r.check == r.expected_check();
  if (is_whole && r.kind == Kind::kVerdict) return inner_->expect_verdict();
  if (is_whole && r.kind == Kind::kLeft) {
    link.has_left = true;
    return;
  }
  const bool is_note = is_whole && r.kind == Kind::kNote && rank_ == 0 && r.dims <= kMaxDims;
  FlightRing* const ring = is_note ? rings_[static_cast<size_t>(link.rank)].get() : nullptr;
  if (!ring || r.seq <= ring->noted.load(std::memory_order_relaxed)) {
    link.is_open = link.can_send = false;
    if (found_) return;
    found_ = {FailureKind::kError, link.rank,
              concat("what rank ", link.rank, " sent to rank ", rank_,
                     " is no note of its operations: is the same tp_native installed everywhere?")};
    return;
  }
  const Signature signature{.op = static_cast<OpCode>(r.op),
                            .dtype = static_cast<DType>(r.dtype),
                            .reduce = static_cast<ReduceOp>(r.reduce),
                            .root = r.root,
                            .dim = r.dim,
                            .shape = std::span(r.shape, r.dims)};
  begin_flight(*ring, r.seq, signature, r.signature, r.chain, static_cast<int64_t>(r.bytes),
               stamp());
}

// ---- leaving

void SocketBoard::leave() {
  if (owner_.is_elsewhere()) {  // a forked child: the connections are its parent's
    inner_->leave();
    return;
  }
  look();  // the last notes, and what the others have sent by now
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(has_left_, true)) return;
    say_goodbye();
  }
  inner_->leave();
  for (const Link& link : links_) (void)::shutdown(link.socket.get(), SHUT_WR);
}

/// Nothing is waited for but room in the sockets, and that not for long.
void SocketBoard::say_goodbye() {
  const double end_s = now_s() + kGoodbyeSeconds;
  for (Link& link : links_) {
    send(link);
    queue(link, {.kind = Kind::kLeft});
    for (send(link); !link.out.empty() && link.can_send && now_s() < end_s; send(link)) {
      pollfd room{link.socket.get(), POLLOUT, 0};
      (void)::poll(&room, 1, 10);
    }
  }
}

std::shared_ptr<Board> make_socket_board(const std::shared_ptr<Communicator>& control,
                                         std::span<const int> sockets) {
  std::vector<Fd> owned;
  for (const int fd : sockets) owned.emplace_back(fd);
  const auto host = std::dynamic_pointer_cast<BoardCommunicator>(control);
  TPN_CHECK(host, "group ", control->identity().name, " has no board to put sockets beside");
  TPN_CHECK(static_cast<int>(owned.size()) == control->identity().size, "group ",
            control->identity().name, " has ", control->identity().size, " ranks, got ",
            owned.size(), " sockets");
  return std::make_shared<SocketBoard>(host->shared_board(), control->identity().rank,
                                       std::move(owned));
}

}  // namespace tp_native::comm
