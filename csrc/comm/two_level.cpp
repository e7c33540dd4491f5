// SPDX-License-Identifier: Apache-2.0
#include "comm/two_level.h"

#include <algorithm>
#include <cctype>
#include <cstring>
#include <numeric>

#include "comm/epilogue.h"
#include "comm/host_communicator.h"
#include "kernels/cpu/convert.h"
#include "kernels/reduce.h"

namespace tp_native::comm {
namespace {

using Buffer = std::vector<char>;

int64_t total(std::span<const int64_t> counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

void copy(void* to, const void* from, int64_t bytes) {
  if (bytes > 0 && to != from) std::memcpy(to, from, static_cast<size_t>(bytes));
}

/// A level's part of `s`, which the ranks compare whole. An average is a sum until the last level.
Signature step(const Signature& s, int root = -1) {
  Signature part = s;
  part.whole = &s;
  part.root = root;
  if (s.reduce == ReduceOp::kAvg) part.reduce = ReduceOp::kSum;
  return part;
}

/// Sums of these types go through the levels in float32 and are rounded once.
bool is_carried_wide(const Signature& s) {
  return (s.dtype == DType::kFloat16 || s.dtype == DType::kBFloat16) &&
         (s.reduce == ReduceOp::kSum || s.reduce == ReduceOp::kAvg);
}

void widen(DType dtype, const void* in, float* out, int64_t count) {
  if (dtype == DType::kFloat16) {
    std::transform(static_cast<const kernels::Float16*>(in),
                   static_cast<const kernels::Float16*>(in) + count, out,
                   [](kernels::Float16 x) { return kernels::to_float(x); });
  } else {
    std::transform(static_cast<const kernels::BFloat16*>(in),
                   static_cast<const kernels::BFloat16*>(in) + count, out,
                   [](kernels::BFloat16 x) { return kernels::to_float(x); });
  }
}

void narrow(DType dtype, const float* in, void* out, int64_t count) {
  if (dtype == DType::kFloat16) {
    std::transform(in, in + count, static_cast<kernels::Float16*>(out), kernels::to_float16);
  } else {
    std::transform(in, in + count, static_cast<kernels::BFloat16*>(out), kernels::to_bfloat16);
  }
}

/// `count` values in float32, in memory that the host's ranks share where there is room.
class Wide {
 public:
  Wide(Communicator& host, DType dtype, const void* in, int64_t count)
      : block_(host.allocate(count * static_cast<int64_t>(sizeof(float)))),
        own_(block_.data ? 0 : static_cast<size_t>(count)),
        data_(block_.data ? static_cast<float*>(block_.data) : own_.data()) {
    widen(dtype, in, data_, count);
  }
  float* data() const { return data_; }

 private:
  Block block_;
  std::vector<float> own_;
  float* data_;
};

/// What the inner communicator found, without its own frame: "rank 0 in all_reduce(...) #7: ..."
std::string inner_text(const std::string& message) {
  size_t begin = 0;
  size_t number = message.find(" #");
  if (number == std::string::npos) number = message.find(" of group ");  // outside any operation
  const size_t colon = number == std::string::npos ? number : message.find(": ", number);
  if (colon != std::string::npos) begin = colon + 2;
  const size_t end = message.rfind("; the group is unusable now");
  return message.substr(begin, end == std::string::npos ? end : end - begin);
}

/// Every "rank N" of a level by its number among all ranks.
std::string renumbered(const std::string& text, const std::function<int64_t(int64_t)>& global) {
  constexpr std::string_view kWord = "rank ";
  std::string out;
  for (size_t i = 0; i < text.size();) {
    const bool is_number = text.compare(i, kWord.size(), kWord) == 0 &&
                           i + kWord.size() < text.size() &&
                           std::isdigit(static_cast<unsigned char>(text[i + kWord.size()])) != 0;
    if (!is_number) {
      out += text[i++];
      continue;
    }
    size_t digits = 0;
    const int64_t local = std::stoll(text.substr(i + kWord.size(), 9), &digits);
    out += concat(kWord, global(local));
    i += kWord.size() + digits;
  }
  return out;
}

}  // namespace

TwoLevel::TwoLevel(Identity identity, std::shared_ptr<Communicator> intra,
                   std::shared_ptr<Communicator> inter, std::shared_ptr<Board> board,
                   std::vector<int64_t> host_sizes)
    : BoardCommunicator(std::move(identity), std::move(board)),
      intra_(std::move(intra)),
      inter_(std::move(inter)),
      host_sizes_(std::move(host_sizes)) {
  int64_t next = 0;
  for (const int64_t n : host_sizes_) {
    TPN_CHECK(n > 0, "a host without ranks");
    first_.push_back(next);
    next += n;
  }
  TPN_CHECK(next == identity_.size, "the hosts have ", next, " ranks, expected ", identity_.size);
  host_ = host_of(identity_.rank);
  TPN_CHECK(intra_->identity().size == host_sizes_[host_] &&
                intra_->identity().rank == local_of(identity_.rank),
            "rank ", identity_.rank, " is rank ", intra_->identity().rank, " of ",
            intra_->identity().size, " on its host, expected ", local_of(identity_.rank), " of ",
            host_sizes_[host_]);
  TPN_CHECK((inter_ != nullptr) == (local_of(identity_.rank) == 0),
            "the first rank of each host, and no other, links it to the others");
  TPN_CHECK(!inter_ || (inter_->identity().size == hosts() && inter_->identity().rank == host_),
            "host ", host_, " of ", hosts(), " is number ", inter_ ? inter_->identity().rank : -1,
            " among the leaders");
  this->board().on_verdict([a = intra_, b = inter_](const Verdict& verdict) {
    a->abort(verdict.text);
    if (b) b->abort(verdict.text);
  });
}

TwoLevel::~TwoLevel() {
  if (!is_forked_child()) close();
}

/// The waits are those of the levels, which know nothing of this group's end.
void TwoLevel::interrupt() noexcept {
  try {
    (void)board().claim({FailureKind::kAborted, identity_.rank,
                         concat("rank ", identity_.rank,
                                " closed the group while one of its threads was in a collective")});
  } catch (const std::exception&) {
    // out of memory: the wait ends at its deadline
  }
}

void TwoLevel::release() noexcept {
  intra_->close();
  if (inter_) inter_->close();
}

Stats TwoLevel::stats() const {
  Stats stats = BoardCommunicator::stats();
  const Stats local = intra_->stats();
  stats.staged = local.staged;
  stats.arena_bytes_in_use = local.arena_bytes_in_use;
  stats.arena_bytes_peak = local.arena_bytes_peak;
  return stats;
}

int TwoLevel::host_of(int rank) const {
  return static_cast<int>(std::ranges::upper_bound(first_, int64_t{rank}) - first_.begin()) - 1;
}

std::span<const int64_t> TwoLevel::of_host(std::span<const int64_t> counts) const {
  return counts.subspan(static_cast<size_t>(first_[host_]),
                        static_cast<size_t>(host_sizes_[host_]));
}

std::vector<int64_t> TwoLevel::by_host(std::span<const int64_t> counts) const {
  std::vector<int64_t> sums;
  for (int h = 0; h < hosts(); ++h)
    sums.push_back(
        total(counts.subspan(static_cast<size_t>(first_[h]), static_cast<size_t>(host_sizes_[h]))));
  return sums;
}

/// Divides by the number of ranks, as the kernel does: of its sources all but one are zero.
void TwoLevel::average(DType dtype, void* data, int64_t count) const {
  const auto width = static_cast<int64_t>(item_bytes(dtype));
  constexpr int64_t kPiece = 4096;
  const Buffer zero(static_cast<size_t>(std::min(kPiece, count) * width), 0);
  std::vector<const void*> src(static_cast<size_t>(identity_.size), zero.data());
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    void* const dst[] = {static_cast<char*>(data) + begin * width};
    src[0] = dst[0];
    kernels::reduce({dtype, ReduceOp::kAvg, identity_.size, src.data(), 1, dst,
                     std::min(kPiece, count - begin), nullptr, 0, 0});
  }
}

// ---- the collectives: up to the leader, over the hosts, down again

void TwoLevel::all_reduce(const Signature& s, const void* in, void* out, int64_t count,
                          const Epilogue& epilogue, Stream stream) {
  TPN_CHECK(kernels::can_reduce(s.dtype, s.reduce), name(s.op), ": ", name(s.dtype),
            " cannot be reduced (", name(s.reduce),
            "): expected float32, float64, float16 or bfloat16");
  TPN_CHECK(
      s.reduce != ReduceOp::kAvg || (!epilogue.bias && !epilogue.residual && !epilogue.norm_weight),
      name(s.op), ": over several hosts nothing can join an average: add it after");
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  collective(s, count * width, 0, [&] {
    if (is_carried_wide(s)) {
      const Wide sum(*intra_, s.dtype, in, count);
      std::vector<float> bias(static_cast<size_t>(epilogue.bias ? epilogue.columns : 0));
      if (epilogue.bias) widen(s.dtype, epilogue.bias, bias.data(), epilogue.columns);
      Signature part = step(s);
      part.dtype = DType::kFloat32;
      Epilogue last = bias_of(epilogue);
      if (last.bias) last.bias = bias.data();
      sum_up(part, s, sum.data(), sum.data(), count, last, stream);
      if (inter_) narrow(s.dtype, sum.data(), out, count);
    } else {
      sum_up(step(s), s, in, out, count, bias_of(epilogue), stream);
    }
    intra_->broadcast(step(s, 0), out, count, stream);
    add_residual_and_norm(s.dtype, epilogue, out, count);
  });
}

/// The leaders' `out` holds the result of `whole`.
void TwoLevel::sum_up(const Signature& part, const Signature& whole, const void* in, void* out,
                      int64_t count, const Epilogue& epilogue, Stream stream) {
  intra_->all_reduce(part, in, out, count, {}, stream);
  if (!inter_) return;
  inter_->all_reduce(part, out, out, count, epilogue, stream);
  if (whole.reduce == ReduceOp::kAvg) average(part.dtype, out, count);
}

void TwoLevel::all_gather(const Signature& s, const void* in, void* out, int64_t rows,
                          std::span<const int64_t> columns, Stream stream) {
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  const int64_t pitch = total(columns);
  std::vector<int64_t> counts;
  for (const int64_t n : columns) counts.push_back(rows * n);
  const std::vector<int64_t> of_hosts = by_host(counts);
  collective(s, counts[identity_.rank] * width, 0, [&] {
    Buffer host(inter_ ? static_cast<size_t>(of_hosts[host_] * width) : 0);
    intra_->gather(step(s, 0), in, host.data(), of_host(counts), stream);
    if (inter_) {
      Buffer all(static_cast<size_t>(rows * pitch * width));
      inter_->all_gather(step(s), host.data(), all.data(), 1, of_hosts, stream);
      const char* from = all.data();
      int64_t start = 0;
      for (const int64_t n : columns) {
        for (int64_t row = 0; row < rows; ++row, from += n * width)
          copy(static_cast<char*>(out) + (row * pitch + start) * width, from, n * width);
        start += n;
      }
    }
    intra_->broadcast(step(s, 0), out, rows * pitch, stream);
  });
}

void TwoLevel::reduce_scatter(const Signature& s, const void* in, void* out,
                              std::span<const int64_t> counts, Stream stream) {
  TPN_CHECK(kernels::can_reduce(s.dtype, s.reduce), "reduce_scatter: ", name(s.dtype),
            " cannot be reduced: expected float32, float64, float16 or bfloat16");
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  const std::vector<int64_t> of_hosts = by_host(counts);
  const int64_t whole = total(counts);
  const int64_t of_mine = inter_ ? of_hosts[host_] : 0;
  collective(s, whole * width, 0, [&] {
    Buffer host(static_cast<size_t>(of_mine * width));
    const auto reduce = [&](const Signature& part, const void* from, void* sum, void* to) {
      intra_->all_reduce(part, from, sum, whole, {}, stream);
      if (!inter_) return;
      inter_->reduce_scatter(part, sum, to, of_hosts, stream);
      if (s.reduce == ReduceOp::kAvg) average(part.dtype, to, of_mine);
    };
    if (is_carried_wide(s)) {
      const Wide sum(*intra_, s.dtype, in, whole);
      std::vector<float> mine(static_cast<size_t>(of_mine));
      Signature part = step(s);
      part.dtype = DType::kFloat32;
      reduce(part, sum.data(), sum.data(), mine.data());
      narrow(s.dtype, mine.data(), host.data(), of_mine);
    } else {
      Buffer sum(static_cast<size_t>(whole * width));
      reduce(step(s), in, sum.data(), host.data());
    }
    intra_->scatter(step(s, 0), host.data(), out, of_host(counts), stream);
  });
}

void TwoLevel::gather(const Signature& s, const void* in, void* out,
                      std::span<const int64_t> counts, Stream stream) {
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  const std::vector<int64_t> of_hosts = by_host(counts);
  const int root_host = host_of(s.root);
  const int root_local = local_of(s.root);
  collective(s, counts[identity_.rank] * width, 0, [&] {
    Buffer host(inter_ ? static_cast<size_t>(of_hosts[host_] * width) : 0);
    intra_->gather(step(s, 0), in, host.data(), of_host(counts), stream);
    const bool is_relayed = host_ == root_host && root_local != 0;
    Buffer all(inter_ && is_relayed ? static_cast<size_t>(total(counts) * width) : 0);
    if (inter_) {
      inter_->gather(step(s, root_host), host.data(), is_relayed ? all.data() : out, of_hosts,
                     stream);
    }
    if (!is_relayed) return intra_->barrier(0, stream);  // what the hosts found reaches all
    std::vector<int64_t> to_root(static_cast<size_t>(host_sizes_[host_]), 0);
    to_root[static_cast<size_t>(root_local)] = total(counts);
    intra_->scatter(step(s, 0), all.data(), out, to_root, stream);
  });
}

void TwoLevel::scatter(const Signature& s, const void* in, void* out,
                       std::span<const int64_t> counts, Stream stream) {
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  const std::vector<int64_t> of_hosts = by_host(counts);
  const int root_host = host_of(s.root);
  const int root_local = local_of(s.root);
  collective(s, counts[identity_.rank] * width, 0, [&] {
    const bool is_relayed = host_ == root_host && root_local != 0;
    Buffer all(inter_ && is_relayed ? static_cast<size_t>(total(counts) * width) : 0);
    if (is_relayed) {
      std::vector<int64_t> by_root(static_cast<size_t>(host_sizes_[host_]), 0);
      by_root[static_cast<size_t>(root_local)] = total(counts);
      intra_->gather(step(s, 0), in, all.data(), by_root, stream);
    }
    Buffer host(inter_ ? static_cast<size_t>(of_hosts[host_] * width) : 0);
    if (inter_) {
      inter_->scatter(step(s, root_host), is_relayed ? all.data() : in, host.data(), of_hosts,
                      stream);
    }
    intra_->scatter(step(s, 0), host.data(), out, of_host(counts), stream);
  });
}

void TwoLevel::broadcast(const Signature& s, void* data, int64_t count, Stream stream) {
  const int root_host = host_of(s.root);
  const int root_local = local_of(s.root);
  const int64_t bytes = count * static_cast<int64_t>(item_bytes(s.dtype));
  collective(s, bytes, 0, [&] {
    // to the leader alone first: no rank goes on before the hosts have compared
    if (host_ == root_host && root_local != 0) {
      std::vector<int64_t> by_root(static_cast<size_t>(host_sizes_[host_]), 0);
      by_root[static_cast<size_t>(root_local)] = count;
      intra_->gather(step(s, 0), data, data, by_root, stream);
    }
    if (inter_) inter_->broadcast(step(s, root_host), data, count, stream);
    intra_->broadcast(step(s, 0), data, count, stream);
  });
}

void TwoLevel::barrier(double timeout_s, Stream stream) {
  const Signature signature;
  collective(signature, 0, timeout_s, [&] {
    // the outer waits are longer, so that the rank that is really late is named
    intra_->barrier(this->timeout_s(), stream);
    if (inter_) inter_->barrier(this->timeout_s(), stream);
    intra_->barrier(2 * this->timeout_s() + 2, stream);
  });
}

// ---- failures

void TwoLevel::check_levels() {
  intra_->check();
  if (inter_) inter_->check();
}

/// The watch of a host's ranks sees who dies or freezes whatever runs.
void TwoLevel::look() {
  const auto* const host = dynamic_cast<const HostCommunicator*>(intra_.get());
  if (!host || board().verdict()) return;
  const std::optional<Verdict> found = host->verdict();
  if (!found) return;
  const auto global = [&](int64_t number) { return first_[host_] + number; };
  board().claim({found->kind, found->culprit < 0 ? -1 : static_cast<int>(global(found->culprit)),
                 renumbered(found->text, global)});
}

std::optional<Verdict> TwoLevel::explain() {
  if (const auto verdict = board().verdict()) return verdict;
  if (const auto failure = intra_->failure()) return translated(*failure, true);
  if (inter_) {
    if (const auto failure = inter_->failure()) return translated(*failure, false);
  }
  return std::nullopt;
}

Verdict TwoLevel::translated(const FailureRecord& failure, bool is_intra) {
  const auto global = [&](int64_t number) {
    if (is_intra) return first_[host_] + number;
    return number < hosts() ? first_[static_cast<size_t>(number)] : number;
  };
  Verdict verdict{failure.kind, failure.peer < 0 ? -1 : static_cast<int>(global(failure.peer)),
                  renumbered(inner_text(failure.message), global)};
  if (failure.kind == FailureKind::kTimeout) {  // a leader may only be waiting for its own host
    const Late late = find_late(board().call_roll(), seq());
    if (late.culprit >= 0) verdict.culprit = late.culprit;
    verdict.text = concat("rank ", verdict.culprit, " did not come within ", timeout_s(), " s; ",
                          late.table, "; raise timeout_s if it is only slow");
  }
  return verdict;
}

}  // namespace tp_native::comm
