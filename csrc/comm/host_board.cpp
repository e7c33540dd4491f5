// SPDX-License-Identifier: Apache-2.0
#include "comm/host_board.h"

#include <utility>

namespace tp_native::comm {

Verdict HostBoard::claim(const Verdict& verdict) {
  host_->publish_abort(verdict.kind, verdict.culprit, verdict.text);
  return host_->verdict().value_or(verdict);
}

int HostBoard::left_before(uint64_t seq) const {
  const int size = host_->identity().size;
  for (int r = 0; r < size; ++r) {
    if (host_->has_left(r) && host_->last(r).seq < seq) return r;
  }
  return -1;
}

void HostBoard::note(const Signature& signature, uint64_t, int64_t bytes) {
  if (signature.op != OpCode::kBarrier) host_->note(signature, bytes);  // a barrier notes itself
}

void HostBoard::look() {
  if (const auto found = host_->compare())
    host_->publish_abort(FailureKind::kMismatch, found->culprit, found->text);
  if (!on_verdict_) return;
  if (const auto held = host_->verdict()) std::exchange(on_verdict_, nullptr)(*held);
}

std::vector<Status> HostBoard::call_roll() {
  std::vector<Status> ranks;
  for (int r = 0; r < host_->identity().size; ++r) {
    const FlightCopy last = host_->last(r);
    ranks.push_back({true, host_->has_left(r), last.end == 0, last.op, last.seq});
  }
  return ranks;
}

}  // namespace tp_native::comm
