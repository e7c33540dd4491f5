// SPDX-License-Identifier: Apache-2.0
// The Board of ranks on one host whose collectives run on its GPUs: their host communicator's
// headers hold the notes, its watch sees who dies.
#pragma once

#include <memory>

#include "comm/board.h"
#include "comm/host_communicator.h"

namespace tp_native::comm {

class HostBoard final : public Board {
 public:
  /// From here on the communicator runs nothing but barriers, in the order of the noted operations.
  explicit HostBoard(std::shared_ptr<HostCommunicator> host) : host_(std::move(host)) {}

  Verdict claim(const Verdict& verdict) override;
  std::optional<Verdict> verdict() const override { return host_->verdict(); }
  int left_before(uint64_t seq) const override;
  void set_status(OpCode, uint64_t, bool) override {}  // the notes say it
  uint64_t noted() const override { return host_->noted(); }
  void note(const Signature& signature, uint64_t seq, int64_t bytes) override;
  void finish(uint64_t seq) noexcept override { host_->finish(seq); }
  void look() override;
  std::string hint() const override { return host_->flight_hint(); }
  std::vector<Status> call_roll() override;
  /// look() tells it.
  void on_verdict(std::function<void(const Verdict&)> fn) override { on_verdict_ = std::move(fn); }
  void leave() override { host_->close(); }

 private:
  std::shared_ptr<HostCommunicator> host_;
  std::function<void(const Verdict&)> on_verdict_;
};

}  // namespace tp_native::comm
