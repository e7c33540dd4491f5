// SPDX-License-Identifier: Apache-2.0
// The collectives: what is staged, who reads what when. Every one begins with a full meet in which
// the fingerprints are compared; before it a rank has written to its own staging slots only.
#include <sched.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "comm/host_communicator.h"
#include "core/callbacks.h"
#include "core/fault.h"
#include "kernels/reduce.h"

namespace tp_native::comm {
namespace {

// one-shot reads P-1 whole messages per rank, two phases 2(P-1)/P: with two ranks the extra meet
// never pays below 4 MiB
constexpr int64_t kTwoPhaseBytes = 32 << 10;
// up to here one meet and P reads beat two meets and half the lines; equal at 4 KiB, 2 ranks,
// tpn_microbench --sizes 1K,2K,4K,8K
constexpr int64_t kOneShotBytes = 2 << 10;

int64_t chunks_of(int64_t bytes, int64_t chunk_bytes) {
  return std::max<int64_t>(1, (bytes + chunk_bytes - 1) / chunk_bytes);
}

const char* at(const void* base, int64_t bytes) { return static_cast<const char*>(base) + bytes; }
char* at(void* base, int64_t bytes) { return static_cast<char*>(base) + bytes; }

/// Rank `rank`'s share of `count` elements, cut at cache lines.
struct Slice {
  int64_t begin, end;
};
Slice slice_of(int64_t count, int64_t width, int rank, int size) {
  const int64_t line = std::max<int64_t>(1, 64 / width);
  const int64_t share = ((count + size - 1) / size + line - 1) / line * line;
  return {std::min(count, share * rank), std::min(count, share * (rank + 1))};
}

void check_reducible(const Signature& s) {
  TPN_CHECK(kernels::can_reduce(s.dtype, s.reduce), name(s.op), ": ", name(s.dtype),
            " values have no ", name(s.reduce), "; convert them to a floating dtype");
}

/// One pass over elements [begin, begin + count) of the result: the ranks' data, bias and residual.
/// The norm needs whole rows: see normalise().
kernels::Reduction reduction_of(const Signature& s, const Epilogue& e, int sources,
                                const void* const* src, int targets, void* const* dst,
                                int64_t begin, int64_t count) {
  return {s.dtype, s.reduce, sources,   src,   targets,   dst,
          count,   e.bias,   e.columns, begin, e.residual};
}

/// out = hidden / rms(hidden) * weight, after `hidden` was completed by other passes.
void normalise(const Signature& s, const Epilogue& e, void* out, int64_t count) {
  const void* const src[] = {e.hidden};
  void* const normed[] = {out};
  kernels::reduce_rms_norm({.dtype = s.dtype,
                            .sources = 1,
                            .src = src,
                            .targets = 1,
                            .normed = normed,
                            .rows = count / e.columns,
                            .columns = e.columns,
                            .norm_weight = e.norm_weight,
                            .eps = e.eps});
}

/// Sum, bias, residual and norm of whole rows, in one pass.
void reduce_rows(const Signature& s, const Epilogue& e, int sources, const void* const* src,
                 int targets, void* const* out, void* const* hidden, int64_t first_row,
                 int64_t rows) {
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  kernels::reduce_rms_norm({s.dtype, sources, src, targets, out, hidden, rows, e.columns, e.bias,
                            e.residual ? at(e.residual, first_row * e.columns * width) : nullptr,
                            e.norm_weight, e.eps});
}

/// Copies bytes [begin, begin + bytes) of a [rows, width] block into a matrix whose rows are
/// `pitch` bytes apart.
void scatter_rows(char* out, const char* in, int64_t begin, int64_t bytes, int64_t width,
                  int64_t pitch) {
  while (bytes > 0) {
    const int64_t column = begin % width;
    const int64_t run = width == pitch ? bytes : std::min(bytes, width - column);
    std::memcpy(out + begin / width * pitch + column, in, static_cast<size_t>(run));
    in += run;
    begin += run;
    bytes -= run;
  }
}

}  // namespace

char* HostCommunicator::slot(int rank, uint64_t chunk) const {
  if (is_inline_) return reinterpret_cast<char*>(line(rank).payload);
  return peers_[rank].mapping->base() + kHeaderBytes + (chunk % kSlots) * kChunkBytes;
}

template <class Body>
void HostCommunicator::collective(const Signature& signature, int64_t bytes, double timeout_s,
                                  Body&& body) {
  check_not_forked();  // before the lock, which another thread may have held at the fork
  TPN_CHECK(!is_reentered(), name(signature.op), " was called by a signal handler while ",
            "this thread is in a collective of group ", identity_.name,
            ": set a flag there and look at it between steps");
  std::lock_guard lock(mutex_);
  const BusyThread::Collective running(busy_thread_, current_, signature);
  timeout_s_ = timeout_s > 0 ? timeout_s : identity_.timeout_s;
  wait_started_s_ = 0;
  is_inline_ = false;
  ++seq_;
  ++meets_;
  check_usable();
  TPN_FAULT("collective.enter");
  bump(collectives_, 1);
  bump(bytes_, static_cast<uint64_t>(bytes));
  bytes_now_ = bytes;
  try {
    body();
    if (is_checked_) end_flight(flight_of(identity_.rank), seq_);
  } catch (...) {
    if (!failure_) {  // nor a verdict: an exception of this process's alone
      publish_abort(
          is_interrupted_ ? FailureKind::kInterrupted : FailureKind::kError, identity_.rank,
          concat("rank ", identity_.rank,
                 is_interrupted_ ? " was interrupted by a signal"
                                 : concat(" failed: ", text_of(std::current_exception()))));
      const Verdict held = *verdict();  // perhaps somebody else's
      failure_ = failure_record(held.kind, held.culprit, held.text);
      arena_->retire();
    }
    throw;
  }
}

/// Chunk c+1 is staged before chunk c is taken, so that a rank copies in while its peers still
/// arrive. `late[r]`: rank r posts its chunks one tick later than first_tick says.
template <class Put, class Take>
void HostCommunicator::pipeline(int64_t chunks, uint64_t first_tick, const bool* late,
                                const Put& put, const Take& take) {
  for (int64_t c = 0; c < chunks; ++c) {
    if (c + 1 < chunks) {
      put(c + 1, slot(identity_.rank, chunk_ + c + 1));  // proof: slot.put
      TPN_FAULT("stage.post");
      post();
    }
    for (int i = 1; i < identity_.size; ++i) {
      const int r = (identity_.rank + i) % identity_.size;
      await(r, first_tick + c + (late && late[r]));
    }
    TPN_FAULT("stage.take");
    take(c);  // proof: slot.take
  }
  chunk_ += chunks;
}

/// `most`: the longest message of any rank in bytes, of which a chunk holds `chunk_bytes`.
template <class Put, class Take>
void HostCommunicator::staged(int64_t most, int64_t chunk_bytes, const Put& put, const Take& take) {
  bump(staged_, 1);
  is_inline_ = most <= static_cast<int64_t>(kInlineBytes) &&
               chunk_bytes == static_cast<int64_t>(kChunkBytes);  // no pieces within a chunk
  TPN_FAULT("stage.put");
  put(int64_t{0}, slot(identity_.rank, chunk_));
  announce(kNoBlock);
  await_all(tick_);
  (void)check_announced(0);
  pipeline(chunks_of(most, chunk_bytes), tick_, nullptr, put, take);
}

Block HostCommunicator::allocate(int64_t bytes) {
  check_not_forked();  // its parent's memory would come back
  return bytes > kOneShotBytes ? arena_->allocate(bytes)
                               : Block{};  // smaller ones are staged anyway
}

void HostCommunicator::all_reduce(const Signature& signature, const void* in, void* out,
                                  int64_t count, const Epilogue& epilogue, Stream) {
  check_reducible(signature);
  if (identity_.size == 1) return reduce_alone(signature, in, out, count, epilogue);
  const int64_t bytes = count * static_cast<int64_t>(item_bytes(signature.dtype));
  // with a norm the hidden state is a result too, and lies behind the normed one
  const int64_t shared_bytes = epilogue.norm_weight ? 2 * bytes : bytes;
  collective(signature, bytes, 0, [&] {
    const bool is_shared = in == out && bytes > kOneShotBytes && arena_->owns(out, shared_bytes) &&
                           (!epilogue.norm_weight || epilogue.hidden == at(out, bytes));
    if (!is_shared) return reduce_staged(signature, in, out, count, epilogue, false);
    announce(static_cast<uint64_t>(static_cast<char*>(out) - arena_->base()));
    await_all(tick_);
    const Announced announced = check_announced(shared_bytes);
    if (!announced.all_shared) return reduce_staged(signature, in, out, count, epilogue, true);
    reduce_shared(signature, announced, out, count, epilogue);
  });
}

void HostCommunicator::reduce_alone(const Signature& s, const void* in, void* out, int64_t count,
                                    const Epilogue& epilogue) const {
  const void* const src[] = {in};
  void* const dst[] = {out};
  void* const hidden[] = {epilogue.hidden};
  if (!epilogue.norm_weight) {
    kernels::reduce(reduction_of(s, epilogue, 1, src, 1, dst, 0, count));
  } else if (count > 0) {
    reduce_rows(s, epilogue, 1, src, 1, dst, hidden, 0, count / epilogue.columns);
  }
}

/// Every operand lies in its rank's arena: each rank reduces its slice of all blocks and stores it
/// into all of them. The slices are whole rows where a norm wants them and there is one for each
/// rank; with fewer rows every rank normalises all of them after the meet.
void HostCommunicator::reduce_shared(const Signature& s, const Announced& announced, void* out,
                                     int64_t count, const Epilogue& epilogue) {
  constexpr int64_t kTileBytes = 16 << 10;  // stays in L1 between the stores to the ranks
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  const int size = identity_.size;
  const auto block = [&](int r, int64_t element) -> void* {
    return peers_[r].mapping->base() + announced.block[r] + element * width;
  };
  void* src[kMaxRanks];
  void* hidden[kMaxRanks];
  TPN_FAULT("shared.push");
  const bool is_normed = epilogue.norm_weight != nullptr;
  const int64_t rows = is_normed ? count / epilogue.columns : 0;
  if (is_normed && rows >= size) {  // proof: shared.push
    const int64_t begin = rows * identity_.rank / size;
    const int64_t end = rows * (identity_.rank + 1) / size;
    for (int r = 0; r < size; ++r) {
      src[r] = block(r, begin * epilogue.columns);
      hidden[r] = block(r, count + begin * epilogue.columns);
    }
    reduce_rows(s, epilogue, size, src, size, src, hidden, begin, end - begin);
  } else {
    const Slice mine = slice_of(count, width, identity_.rank, size);
    const int64_t tile = kTileBytes / width;
    for (int64_t begin = mine.begin; begin < mine.end; begin += tile) {
      for (int r = 0; r < size; ++r) {
        src[r] = block(r, begin);
        hidden[r] = block(r, count + begin);
      }
      kernels::reduce(reduction_of(s, epilogue, size, src, size, is_normed ? hidden : src, begin,
                                   std::min(tile, mine.end - begin)));
    }
  }
  TPN_FAULT("shared.post");
  post();
  await_all(tick_);
  if (is_normed && rows < size && count > 0) normalise(s, epilogue, out, count);
}

/// `is_shared`: this rank has announced a block while a peer announced none. It stages now, one
/// tick after those that staged before they announced.
void HostCommunicator::reduce_staged(const Signature& s, const void* in, void* out, int64_t count,
                                     const Epilogue& epilogue, bool is_shared) {
  const int me = identity_.rank;
  const int size = identity_.size;
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  const int64_t bytes = count * width;
  const auto chunk_bytes = static_cast<int64_t>(kChunkBytes);
  const int64_t chunks = chunks_of(bytes, chunk_bytes);
  const bool is_normed = epilogue.norm_weight != nullptr;
  const bool is_one_pass = is_normed && chunks == 1;  // all rows at once
  void* const target = is_normed ? epilogue.hidden : out;
  const auto length = [&](int64_t c) { return std::min(chunk_bytes, bytes - c * chunk_bytes); };
  const auto put = [&](int64_t c, char* to) {
    std::memcpy(to, at(in, c * chunk_bytes), static_cast<size_t>(length(c)));
  };
  const auto take = [&](int64_t c) {
    const void* src[kMaxRanks];
    for (int r = 0; r < size; ++r) src[r] = slot(r, chunk_ + c);
    src[me] = at(in, c * chunk_bytes);
    void* const dst[] = {at(is_one_pass ? out : target, c * chunk_bytes)};
    if (is_one_pass) {
      reduce_rows(s, epilogue, size, src, 1, dst, &target, 0, count / epilogue.columns);
    } else {
      kernels::reduce(
          reduction_of(s, epilogue, size, src, 1, dst, c * chunk_bytes / width, length(c) / width));
    }
  };

  bump(staged_, 1);
  is_inline_ = bytes <= static_cast<int64_t>(kInlineBytes);
  uint64_t announced_tick = tick_;
  if (!is_shared) {
    TPN_FAULT("stage.put");
    if (bytes > 0) put(0, slot(me, chunk_));
    announce(kNoBlock);
    announced_tick = tick_;
    await_all(tick_);
  }
  const Announced announced = check_announced(is_normed ? 2 * bytes : bytes);
  if (bytes == 0) return;

  if (announced.any_shared) {
    bool late[kMaxRanks];
    for (int r = 0; r < size; ++r) late[r] = announced.block[r] != kNoBlock;
    if (is_shared) {
      put(0, slot(me, chunk_));
      post();
    }
    pipeline(chunks, announced_tick, late, put, take);
    if (!is_shared) post();  // the late ranks posted one more
  } else if (size == 2 || bytes <= kTwoPhaseBytes) {
    pipeline(chunks, announced_tick, nullptr, put, take);
  } else {
    for (int64_t c = 0; c < chunks; ++c, ++chunk_) {
      if (c > 0) {
        put(c, slot(me, chunk_));
        post();
        await_all(tick_);
      }
      const Slice mine = slice_of(length(c) / width, width, me, size);
      void* block[kMaxRanks];
      for (int r = 0; r < size; ++r) block[r] = slot(r, chunk_) + mine.begin * width;
      // proof: slot.push
      kernels::reduce(reduction_of(s, epilogue, size, block, size, block,
                                   c * chunk_bytes / width + mine.begin, mine.end - mine.begin));
      post();
      await_all(tick_);
      std::memcpy(at(target, c * chunk_bytes), slot(me, chunk_), static_cast<size_t>(length(c)));
    }
    if (is_normed) normalise(s, epilogue, out, count);
    return;
  }
  if (is_normed && !is_one_pass) normalise(s, epilogue, out, count);
}

void HostCommunicator::all_gather(const Signature& signature, const void* in, void* out,
                                  int64_t rows, std::span<const int64_t> columns, Stream) {
  const auto width = static_cast<int64_t>(item_bytes(signature.dtype));
  int64_t pitch = 0;
  int64_t most = 0;
  int64_t start[kMaxRanks];
  for (int r = 0; r < identity_.size; ++r) {
    start[r] = pitch;
    pitch += columns[r] * width;
    most = std::max(most, rows * columns[r] * width);
  }
  const auto total = [&](int r) { return rows * columns[r] * width; };
  const int me = identity_.rank;
  if (identity_.size == 1) {
    if (in != out && total(0) > 0) std::memcpy(out, in, static_cast<size_t>(total(0)));
    return;
  }
  const auto chunk_bytes = static_cast<int64_t>(kChunkBytes);
  const auto length = [&](int r, int64_t c) {
    return std::clamp<int64_t>(total(r) - c * chunk_bytes, 0, chunk_bytes);
  };
  const auto put = [&](int64_t c, char* to) {
    if (length(me, c) > 0)
      std::memcpy(to, at(in, c * chunk_bytes), static_cast<size_t>(length(me, c)));
  };
  const auto take = [&](int64_t c) {
    for (int r = 0; r < identity_.size; ++r) {
      const char* const from = r == me ? at(in, c * chunk_bytes) : slot(r, chunk_ + c);
      scatter_rows(at(out, start[r]), from, c * chunk_bytes, length(r, c), columns[r] * width,
                   pitch);
    }
  };
  collective(signature, total(me), 0, [&] { staged(most, chunk_bytes, put, take); });
}

void HostCommunicator::reduce_scatter(const Signature& signature, const void* in, void* out,
                                      std::span<const int64_t> counts, Stream) {
  check_reducible(signature);
  const auto width = static_cast<int64_t>(item_bytes(signature.dtype));
  const int me = identity_.rank;
  const int size = identity_.size;
  if (size == 1) return reduce_alone(signature, in, out, counts[0], {});
  // a chunk holds an equal piece for every receiver
  const int64_t piece = static_cast<int64_t>(kChunkBytes) / size / 64 * 64 / width;
  int64_t start[kMaxRanks];
  int64_t whole = 0;
  int64_t most = 0;
  for (int r = 0; r < size; ++r) {
    start[r] = whole;
    whole += counts[r];
    most = std::max(most, counts[r]);
  }
  const auto length = [&](int r, int64_t c) {
    return std::clamp<int64_t>(counts[r] - c * piece, 0, piece);
  };
  const auto put = [&](int64_t c, char* to) {
    for (int r = 0; r < size; ++r) {
      if (r == me || length(r, c) == 0) continue;
      std::memcpy(to + r * piece * width, at(in, (start[r] + c * piece) * width),
                  static_cast<size_t>(length(r, c) * width));
    }
  };
  const auto take = [&](int64_t c) {
    const void* src[kMaxRanks];
    for (int r = 0; r < size; ++r) src[r] = slot(r, chunk_ + c) + me * piece * width;
    src[me] = at(in, (start[me] + c * piece) * width);
    void* const dst[] = {at(out, c * piece * width)};
    kernels::reduce(reduction_of(signature, {}, size, src, 1, dst, 0, length(me, c)));
  };
  collective(signature, whole * width, 0, [&] { staged(most, piece, put, take); });
}

void HostCommunicator::gather(const Signature& signature, const void* in, void* out,
                              std::span<const int64_t> counts, Stream) {
  const auto width = static_cast<int64_t>(item_bytes(signature.dtype));
  const int me = identity_.rank;
  const auto total = [&](int r) { return counts[r] * width; };
  if (identity_.size == 1) {
    if (in != out && total(0) > 0) std::memcpy(out, in, static_cast<size_t>(total(0)));
    return;
  }
  const auto chunk_bytes = static_cast<int64_t>(kChunkBytes);
  const auto length = [&](int r, int64_t c) {
    return static_cast<size_t>(std::clamp<int64_t>(total(r) - c * chunk_bytes, 0, chunk_bytes));
  };
  const auto put = [&](int64_t c, char* to) {
    if (me != signature.root && length(me, c) > 0)
      std::memcpy(to, at(in, c * chunk_bytes), length(me, c));
  };
  const auto take = [&](int64_t c) {
    if (me != signature.root) return;
    int64_t start = c * chunk_bytes;
    for (int r = 0; r < identity_.size; start += total(r++)) {
      const char* const from = r == me ? at(in, c * chunk_bytes) : slot(r, chunk_ + c);
      if (length(r, c) > 0) std::memcpy(at(out, start), from, length(r, c));
    }
  };
  const int64_t most = *std::ranges::max_element(counts) * width;
  collective(signature, total(me), 0, [&] { staged(most, chunk_bytes, put, take); });
}

void HostCommunicator::scatter(const Signature& signature, const void* in, void* out,
                               std::span<const int64_t> counts, Stream) {
  const auto width = static_cast<int64_t>(item_bytes(signature.dtype));
  const int me = identity_.rank;
  const int size = identity_.size;
  const bool is_root = me == signature.root;
  const int64_t piece = static_cast<int64_t>(kChunkBytes) / size / 64 * 64;  // for each receiver
  const auto length = [&](int r, int64_t c) {
    return static_cast<size_t>(std::clamp<int64_t>(counts[r] * width - c * piece, 0, piece));
  };
  const auto start = [&](int r) {
    return std::accumulate(counts.begin(), counts.begin() + r, int64_t{0}) * width;
  };
  const auto put = [&](int64_t c, char* to) {
    for (int r = 0; is_root && r < size; ++r) {
      if (r != me && length(r, c) > 0)
        std::memcpy(to + r * piece, at(in, start(r) + c * piece), length(r, c));
    }
  };
  if (size == 1) {
    if (in != out && counts[0] > 0) std::memcpy(out, in, static_cast<size_t>(counts[0] * width));
    return;
  }
  const auto take = [&](int64_t c) {
    const char* const from =
        is_root ? at(in, start(me) + c * piece) : slot(signature.root, chunk_ + c) + me * piece;
    if (length(me, c) > 0) std::memcpy(at(out, c * piece), from, length(me, c));
  };
  const int64_t most = *std::ranges::max_element(counts) * width;
  collective(signature, counts[me] * width, 0, [&] { staged(most, piece, put, take); });
}

void HostCommunicator::broadcast(const Signature& signature, void* data, int64_t count, Stream) {
  if (identity_.size == 1) return;
  const int64_t bytes = count * static_cast<int64_t>(item_bytes(signature.dtype));
  const auto chunk_bytes = static_cast<int64_t>(kChunkBytes);
  const bool is_root = identity_.rank == signature.root;
  const auto length = [&](int64_t c) {
    return static_cast<size_t>(std::min(chunk_bytes, bytes - c * chunk_bytes));
  };
  const auto put = [&](int64_t c, char* to) {
    if (is_root && bytes > 0) std::memcpy(to, at(data, c * chunk_bytes), length(c));
  };
  const auto take = [&](int64_t c) {
    if (!is_root && bytes > 0)
      std::memcpy(at(data, c * chunk_bytes), slot(signature.root, chunk_ + c), length(c));
  };
  collective(signature, bytes, 0, [&] { staged(bytes, chunk_bytes, put, take); });
}

void HostCommunicator::barrier(double timeout_s, Stream) {
  if (identity_.size == 1) return;
  const Signature signature;
  collective(signature, 0, timeout_s, [&] {
    announce(kNoBlock);
    await_all(tick_);
    (void)check_announced(0);
  });
}

}  // namespace tp_native::comm
