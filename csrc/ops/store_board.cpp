// SPDX-License-Identifier: Apache-2.0
#include "ops/store_board.h"

#include <chrono>
#include <sstream>

#include "core/callbacks.h"

namespace tp_native::ops {
namespace {

using comm::Status;
using comm::Verdict;
using Clock = std::chrono::steady_clock;

constexpr auto kTick = std::chrono::milliseconds(100);
constexpr auto kRollTick = std::chrono::milliseconds(20);
constexpr auto kRollLimit = std::chrono::milliseconds(1000);  // ten ticks of the slowest rank
constexpr auto kStoreTimeout = std::chrono::milliseconds(5000);

std::string encode(const Verdict& v) {
  return concat(static_cast<int>(v.kind), ' ', v.culprit, ' ', v.text);
}

Verdict decode(const std::string& text) {
  std::istringstream in(text);
  int kind = 0;
  Verdict v;
  in >> kind >> v.culprit;
  in.get();
  v.kind = static_cast<FailureKind>(kind);
  std::getline(in, v.text, '\0');
  return v;
}

}  // namespace

StoreBoard::StoreBoard(const c10::intrusive_ptr<c10d::Store>& store, std::string prefix, int rank,
                       int size)
    : origin_(store),
      store_(store->clone()),  // a connection of its own: another thread may wait on the first one
      prefix_(std::move(prefix)),
      rank_(rank),
      size_(size),
      left_(static_cast<size_t>(size), -1) {
  store_->setTimeout(kStoreTimeout);
  announce();  // makes the counter, and fails here where the store does not work
  thread_ = std::thread([this] { run(); });
}

StoreBoard::~StoreBoard() { leave(); }

void StoreBoard::leave() {
  if (owner_.is_elsewhere()) {  // a forked child: the thread is its parent's, and so is the lock
    if (thread_.joinable()) thread_.detach();
    (void)origin_.release();  // a store's server has a thread too
    (void)store_.release();
    return;
  }
  {
    std::lock_guard lock(mutex_);
    if (std::exchange(has_left_, true)) return;
    is_stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
  try {
    put(concat("left/", rank_), own_status());
    announce();
  } catch (const std::exception&) {
    // the store ended first: its other clients see that themselves
  }
}

void StoreBoard::run() {
  int64_t seen = 0;
  bool has_failed = false;
  std::unique_lock lock(mutex_);
  while (!is_stopping_) {
    lock.unlock();
    try {
      const int64_t events = store_->add(prefix_ + "events", 0);
      if (events != seen) refresh();
      seen = events;
      has_failed = false;
    } catch (const std::exception&) {
      if (has_failed) return;  // twice: it is gone
      has_failed = true;
    }
    lock.lock();
    changed_.wait_for(lock, kTick, [&] { return is_stopping_ || is_hurried_; });
    is_hurried_ = false;
  }
}

void StoreBoard::refresh() {
  if (const auto text = find("verdict")) adopt(decode(*text));
  if (find("roll")) answer();
  for (int r = 0; r < size_; ++r) {
    if (r == rank_) continue;
    if (const auto text = find(concat("left/", r))) {
      std::lock_guard lock(mutex_);
      left_[static_cast<size_t>(r)] = std::atoll(text->c_str());
      has_news_.store(true, std::memory_order_release);
    }
  }
}

void StoreBoard::answer() { put(concat("here/", rank_), own_status()); }

void StoreBoard::adopt(const Verdict& verdict) {
  std::function<void(const Verdict&)> tell;
  {
    std::lock_guard lock(mutex_);
    if (verdict_) return;
    verdict_ = verdict;
    tell = on_verdict_;
    has_news_.store(true, std::memory_order_release);
  }
  if (tell) tell(verdict);
}

Verdict StoreBoard::claim(const Verdict& verdict) {
  if (const auto known = this->verdict()) return *known;
  Verdict winner = verdict;
  try {
    const std::string mine = encode(verdict);
    const auto held = store_->compareSet(prefix_ + "verdict", std::vector<uint8_t>(),
                                         std::vector<uint8_t>(mine.begin(), mine.end()));
    winner = decode(std::string(held.begin(), held.end()));
    announce();
  } catch (const std::exception& error) {
    winner.text += concat(" (the store cannot be reached either: ", error.what(), ")");
  }
  adopt(winner);
  return winner;
}

std::optional<Verdict> StoreBoard::verdict() const {
  if (!has_news_.load(std::memory_order_acquire)) return std::nullopt;
  std::lock_guard lock(mutex_);
  return verdict_;
}

int StoreBoard::left_before(uint64_t seq) const {
  if (!has_news_.load(std::memory_order_acquire)) return -1;
  std::lock_guard lock(mutex_);
  for (int r = 0; r < size_; ++r) {
    const int64_t last = left_[static_cast<size_t>(r)];
    if (last >= 0 && static_cast<uint64_t>(last) < seq) return r;
  }
  return -1;
}

void StoreBoard::set_status(comm::OpCode op, uint64_t seq, bool is_inside) {
  std::lock_guard lock(mutex_);
  op_ = op;
  seq_ = seq;
  is_inside_ = is_inside;
}

uint64_t StoreBoard::noted() const {
  std::lock_guard lock(mutex_);
  return seq_;
}

void StoreBoard::expect_verdict() {
  {
    std::lock_guard lock(mutex_);
    is_hurried_ = true;
  }
  changed_.notify_all();
}

std::vector<Status> StoreBoard::call_roll() {
  std::vector<Status> ranks(static_cast<size_t>(size_));
  try {
    put("roll", "1");
    announce();
    answer();
    const auto end = Clock::now() + kRollLimit;
    for (bool is_complete = false; !is_complete && Clock::now() < end;) {
      is_complete = true;
      for (int r = 0; r < size_; ++r) {
        Status& status = ranks[static_cast<size_t>(r)];
        if (!status.is_known && !status.has_left) status = status_of(r);
        is_complete = is_complete && (status.is_known || status.has_left);
      }
      if (!is_complete) std::this_thread::sleep_for(kRollTick);
    }
  } catch (const std::exception& error) {
    warn(concat("the store cannot be reached: ", error.what()));
    return {};  // nobody can be blamed
  }
  return ranks;
}

Status StoreBoard::status_of(int rank) {
  Status status;
  auto text = find(concat("left/", rank));
  status.has_left = text.has_value();
  if (!text) text = find(concat("here/", rank));
  if (!text) return status;
  status.is_known = true;
  std::istringstream in(*text);
  int op = 0;
  in >> status.seq >> op >> status.is_inside;
  status.op = static_cast<comm::OpCode>(op);
  return status;
}

void StoreBoard::on_verdict(std::function<void(const Verdict&)> fn) {
  std::optional<Verdict> known;
  {
    std::lock_guard lock(mutex_);
    on_verdict_ = fn;
    known = verdict_;
  }
  if (known && fn) fn(*known);
}

std::optional<std::string> StoreBoard::find(const std::string& key) {
  if (!store_->check({prefix_ + key})) return std::nullopt;
  const auto value = store_->get(prefix_ + key);
  return std::string(value.begin(), value.end());
}

void StoreBoard::put(const std::string& key, const std::string& value) {
  store_->set(prefix_ + key, std::vector<uint8_t>(value.begin(), value.end()));
}

void StoreBoard::announce() { store_->add(prefix_ + "events", 1); }

std::string StoreBoard::own_status() const {
  std::lock_guard lock(mutex_);
  return concat(seq_, ' ', static_cast<int>(op_), ' ', is_inside_ ? 1 : 0);
}

}  // namespace tp_native::ops
