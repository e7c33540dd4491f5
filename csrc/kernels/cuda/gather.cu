// SPDX-License-Identifier: Apache-2.0
// All-gather and broadcast: every rank stages what it gives, all meet, every rank copies the rest.
#include <cuda_runtime.h>

#include "kernels/cuda/collective.cuh"

namespace tp_native::kernels::cuda {
namespace {

/// slices.begin is where rank r's part lies in `out`; in staging each lies at the front.
template <class T>
struct Parts {
  const T* in;
  T* out;
  Slices slices;
};

template <class T>
__global__ void __launch_bounds__(kCollectiveThreads, 2)
    gather_parts(const __grid_constant__ Peers peers, const __grid_constant__ Parts<T> parts) {
  const Share share = share_of_collective();
  Meetings meetings(peers, peers.rank, share);
  const PeerTerms<T> terms{peers.data, meetings.buffer(), peers.size, peers.rank, parts.in};
  const int64_t own_length = parts.slices.length[peers.rank];
  T* const own_out = parts.out + parts.slices.begin[peers.rank];
  copy_flat(share, parts.in, terms.staging(peers.rank), own_length);
  if (own_out != parts.in) copy_flat(share, parts.in, own_out, own_length);
  if (!meetings.meet()) return;
  gather_slices(share, terms, parts.slices, parts.out);
  meetings.finish();
}

/// bytes[r] of rank r, side by side in `out`. The unit is the largest that all places and lengths
/// are multiples of.
void gather_bytes(const Peers& peers, const void* in, void* out, std::span<const int64_t> bytes,
                  int blocks, const char* what, StreamHandle stream) {
  int64_t most = 0;
  int64_t total = 0;
  uint64_t places = reinterpret_cast<uintptr_t>(out);
  for (const int64_t b : bytes) {
    most = std::max(most, b);
    total += b;
    places |= static_cast<uint64_t>(b);
  }
  if (total == 0) return;
  if (bytes[static_cast<size_t>(peers.rank)] > 0) places |= reinterpret_cast<uintptr_t>(in);
  check_peers(peers, staged_bytes(most), what);
  const unsigned grid = blocks_for(blocks, tiles_for(most), what);
  const auto launch = [&](auto unit) {
    using T = decltype(unit);
    Parts<T> parts{static_cast<const T*>(in), static_cast<T*>(out), slices_of(bytes, 1)};
    for (int r = 0; r < peers.size; ++r) {
      parts.slices.begin[r] /= static_cast<int64_t>(sizeof(T));
      parts.slices.length[r] /= static_cast<int64_t>(sizeof(T));
      parts.slices.staged[r] = 0;
    }
    gather_parts<<<grid, kCollectiveThreads, 0, stream>>>(peers, parts);
  };
  if (places % 4 == 0) {
    launch(uint32_t{});
  } else if (places % 2 == 0) {
    launch(uint16_t{});
  } else {
    launch(uint8_t{});
  }
  check_launch(what);
}

}  // namespace

void all_gather(const Peers& peers, const AllGather& gather, StreamHandle stream) {
  TPN_CHECK(gather.bytes.size() == static_cast<size_t>(peers.size),
            "all_gather: ", gather.bytes.size(), " counts for ", peers.size, " ranks");
  gather_bytes(peers, gather.in, gather.out, gather.bytes, gather.blocks, "all_gather", stream);
}

void broadcast(const Peers& peers, const Broadcast& broadcast, StreamHandle stream) {
  TPN_CHECK(broadcast.root >= 0 && broadcast.root < peers.size, "broadcast: root ", broadcast.root,
            " of ", peers.size, " ranks");
  int64_t bytes[kMaxRanks] = {};
  bytes[broadcast.root] = broadcast.bytes;
  gather_bytes(peers, broadcast.in, broadcast.out, {bytes, static_cast<size_t>(peers.size)},
               broadcast.blocks, "broadcast", stream);
}

}  // namespace tp_native::kernels::cuda
