// SPDX-License-Identifier: Apache-2.0
#include "comm/peer_communicator.h"

#include <algorithm>
#include <numeric>

#include "comm/backends.h"
#include "comm/host_board.h"

namespace tp_native::comm {
namespace {

using kernels::AllReduceKind;

constexpr int64_t kPayloadBytes = 8 << 20;

int64_t total(std::span<const int64_t> counts) {
  return std::accumulate(counts.begin(), counts.end(), int64_t{0});
}

const char* at(const void* base, int64_t bytes) {
  return base ? static_cast<const char*>(base) + bytes : nullptr;
}
char* at(void* base, int64_t bytes) { return base ? static_cast<char*>(base) + bytes : nullptr; }

/// Where in each rank's part the next piece of at most `most` begins, and how long it is.
struct Pieces {
  std::vector<int64_t> offsets, lengths;
  bool next(std::span<const int64_t> counts, int64_t most) {
    if (offsets.empty()) {
      offsets.assign(counts.size(), 0);
      lengths.assign(counts.size(), 0);
    }
    for (size_t r = 0; r < counts.size(); ++r) {
      offsets[r] += lengths[r];
      lengths[r] = std::min(most, counts[r] - offsets[r]);
    }
    return total(lengths) > 0;
  }
};

}  // namespace

PeerCommunicator::PeerCommunicator(Identity identity, const cuda::Device& device,
                                   std::unique_ptr<PeerMemory> memory,
                                   std::shared_ptr<Communicator> control,
                                   std::shared_ptr<Board> board)
    : DeviceCommunicator(std::move(identity), device, std::move(control), std::move(board)),
      memory_(std::move(memory)) {
  start_watch();
}

PeerCommunicator::~PeerCommunicator() { stop_watch(); }

template <class Kernel>
void PeerCommunicator::run(cuda::StreamHandle stream, const Kernel& kernel) {
  kernel(memory_->before(stream));
  memory_->after(stream);
}

void PeerCommunicator::all_reduce(const Signature& s, const void* in, void* out, int64_t count,
                                  const Epilogue& e, Stream stream) {
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  const bool has_rows = e.columns > 0 && (e.bias || e.norm_weight);
  const int64_t columns = has_rows ? e.columns : count;
  const int64_t most = memory_->payload_bytes() / width;  // values of one kernel
  TPN_CHECK(!has_rows || columns <= most, "rows of ", columns, " values are longer than the ", most,
            " that ranks on a GPU exchange at once");
  launch(s, count * width, stream, [&](cuda::StreamHandle on) {
    const int64_t step = has_rows ? most / columns * columns : most;
    for (int64_t first = 0; first < count; first += step) {
      const int64_t now = std::min(step, count - first);
      const bool is_followed = e.bias || e.residual || e.norm_weight;
      const AllReduceKind choice = kernels::choose_all_reduce(now * width, identity_.size);
      const AllReduceKind kind = is_followed || choice == AllReduceKind::kOneShot
                                     ? AllReduceKind::kOneShot
                                     : AllReduceKind::kTwoShot;
      Epilogue part = e;
      part.residual = at(e.residual, first * width);
      part.hidden = at(e.hidden, first * width);
      memory_->all_reduce(kind, s, at(in, first * width), at(out, first * width), now, part, on);
    }
  });
}

/// Rank r's `bytes[r]` bytes, one block behind the other.
void PeerCommunicator::gather_blocks(const char* in, char* out, std::span<const int64_t> bytes,
                                     cuda::StreamHandle on) {
  if (std::ranges::max(bytes) <= memory_->payload_bytes()) {
    if (total(bytes) == 0) return;
    run(on, [&](const kernels::cuda::Peers& peers) {
      kernels::cuda::all_gather(peers, {.in = in, .out = out, .bytes = bytes}, on);
    });
    return;
  }
  const cuda::Workspace pieces(identity_.size * memory_->payload_bytes(), on, "all_gather");
  for (Pieces p; p.next(bytes, memory_->payload_bytes());) {
    run(on, [&](const kernels::cuda::Peers& peers) {
      kernels::cuda::all_gather(
          peers, {.in = in + p.offsets[identity_.rank], .out = pieces.data(), .bytes = p.lengths},
          on);
    });
    const char* from = pieces.data();
    char* to = out;
    for (size_t r = 0; r < bytes.size(); from += p.lengths[r], to += bytes[r], ++r)
      cuda::copy(to + p.offsets[r], from, p.lengths[r], on);
  }
}

void PeerCommunicator::all_gather(const Signature& s, const void* in, void* out, int64_t rows,
                                  std::span<const int64_t> columns, Stream stream) {
  std::vector<int64_t> widths;  // of a row in bytes, by rank
  std::vector<int64_t> bytes;
  for (const int64_t n : columns) {
    widths.push_back(n * static_cast<int64_t>(item_bytes(s.dtype)));
    bytes.push_back(widths.back() * rows);
  }
  const int64_t pitch = total(widths);
  launch(s, bytes[identity_.rank], stream, [&](cuda::StreamHandle on) {
    if (rows <= 1) {
      gather_blocks(static_cast<const char*>(in), static_cast<char*>(out), bytes, on);
      return;
    }
    const cuda::Workspace blocks(rows * pitch, on, "all_gather");
    gather_blocks(static_cast<const char*>(in), blocks.data(), bytes, on);
    const char* from = blocks.data();
    char* to = static_cast<char*>(out);
    for (size_t r = 0; r < widths.size(); from += bytes[r], to += widths[r], ++r)
      cuda::copy_rows(to, pitch, from, widths[r], widths[r], rows, on);
  });
}

void PeerCommunicator::reduce_scatter(const Signature& s, const void* in, void* out,
                                      std::span<const int64_t> counts, Stream stream) {
  const auto width = static_cast<int64_t>(item_bytes(s.dtype));
  launch(s, total(counts) * width, stream, [&](cuda::StreamHandle on) {
    const auto reduce = [&](const void* from, void* to, std::span<const int64_t> part) {
      run(on, [&](const kernels::cuda::Peers& peers) {
        kernels::cuda::reduce_scatter(
            peers, {.dtype = s.dtype, .op = s.reduce, .in = from, .out = to, .counts = part}, on);
      });
    };
    if (total(counts) == 0) return;
    if (kernels::cuda::reduce_scatter_payload(s.dtype, counts) <= memory_->payload_bytes()) {
      reduce(in, out, counts);
      return;
    }
    const int64_t most = memory_->payload_bytes() / identity_.size / 16 * 16 / width;
    const cuda::Workspace packed(identity_.size * most * width, on, "reduce_scatter");
    for (Pieces p; p.next(counts, most);) {
      const char* from = static_cast<const char*>(in);
      char* to = packed.data();
      for (size_t r = 0; r < counts.size(); ++r) {
        cuda::copy(to, from + p.offsets[r] * width, p.lengths[r] * width, on);
        from += counts[r] * width;
        to += p.lengths[r] * width;
      }
      reduce(packed.data(), at(out, p.offsets[identity_.rank] * width), p.lengths);
    }
  });
}

void PeerCommunicator::broadcast_bytes(const char* in, char* out, int64_t bytes, int root,
                                       cuda::StreamHandle on) {
  const int64_t most = memory_->payload_bytes();
  for (int64_t first = 0; first < bytes; first += most) {
    run(on, [&](const kernels::cuda::Peers& peers) {
      kernels::cuda::broadcast(peers,
                               {.in = at(in, first),
                                .out = at(out, first),
                                .bytes = std::min(most, bytes - first),
                                .root = root},
                               on);
    });
  }
}

void PeerCommunicator::broadcast(const Signature& s, void* data, int64_t count, Stream stream) {
  const int64_t bytes = count * static_cast<int64_t>(item_bytes(s.dtype));
  launch(s, bytes, stream, [&](cuda::StreamHandle on) {
    broadcast_bytes(static_cast<const char*>(data), static_cast<char*>(data), bytes, s.root, on);
  });
}

/// All ranks get all of it, and all but the root drop it: what these two are for is not speed.
void PeerCommunicator::gather(const Signature& s, const void* in, void* out,
                              std::span<const int64_t> counts, Stream stream) {
  std::vector<int64_t> bytes;
  for (const int64_t n : counts) bytes.push_back(n * static_cast<int64_t>(item_bytes(s.dtype)));
  launch(s, bytes[identity_.rank], stream, [&](cuda::StreamHandle on) {
    const cuda::Workspace all(total(bytes), on, "gather");
    gather_blocks(static_cast<const char*>(in), all.data(), bytes, on);
    if (identity_.rank == s.root) cuda::copy(out, all.data(), total(bytes), on);
  });
}

void PeerCommunicator::scatter(const Signature& s, const void* in, void* out,
                               std::span<const int64_t> counts, Stream stream) {
  std::vector<int64_t> bytes;
  for (const int64_t n : counts) bytes.push_back(n * static_cast<int64_t>(item_bytes(s.dtype)));
  launch(s, bytes[identity_.rank], stream, [&](cuda::StreamHandle on) {
    const cuda::Workspace all(total(bytes), on, "scatter");
    broadcast_bytes(static_cast<const char*>(in), all.data(), total(bytes), s.root, on);
    const int64_t before =
        std::accumulate(bytes.begin(), bytes.begin() + identity_.rank, int64_t{0});
    cuda::copy(out, all.data() + before, bytes[identity_.rank], on);
  });
}

void PeerCommunicator::drop() noexcept {
  memory_->abort();
  DeviceCommunicator::drop();
}

void PeerCommunicator::end(bool is_orderly) noexcept {
  if (!is_orderly) memory_->abort();
}

std::shared_ptr<Communicator> make_peers(int device, const std::shared_ptr<Communicator>& control) {
  TPN_CHECK(kernels::cuda::is_built(),
            "this build has no CUDA kernels: build tp_native where nvcc is found");
  const auto host = std::dynamic_pointer_cast<HostCommunicator>(control);
  TPN_CHECK(host, "ranks that reach each other's GPU memory must be on one host");
  Identity identity = control->identity();
  identity.device = device;
  const cuda::Device gpu(device);
  auto memory = std::make_unique<PeerMemory>(gpu, *control, kPayloadBytes);
  return std::make_shared<PeerCommunicator>(identity, gpu, std::move(memory), control,
                                            std::make_shared<HostBoard>(host));
}

}  // namespace tp_native::comm
