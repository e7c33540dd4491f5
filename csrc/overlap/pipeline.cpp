// SPDX-License-Identifier: Apache-2.0
#include "overlap/pipeline.h"

#include <algorithm>
#include <utility>

namespace tp_native::overlap {
namespace {

// As many streams as torch's pool hands out at one priority; beyond, idle ones change hands.
constexpr size_t kMostSides = 32;

void launch(const Schedule& schedule, const Step& step, cuda::StreamHandle stream,
            const Launches& launches) {
  switch (step.work) {
    case Work::kGemm:
      return launches.gemm(schedule.chunks[step.chunk], stream);
    case Work::kCommunicate:
      return launches.communicate(schedule.chunks[step.chunk], stream);
    case Work::kBeside:
      return launches.beside(stream);
    case Work::kFork:
    case Work::kJoin:
      return;
  }
}

/// Joins on the way out of a run that failed.
class Fork {
 public:
  Fork(cuda::StreamHandle caller, cuda::StreamHandle side, const cuda::Event& event)
      : caller_(caller), side_(side), event_(event) {}
  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;
  ~Fork() {
    // Waits that were launched keep the event's earlier record. What fails here has failed before.
    if (is_open_ && cuda::driver().EventRecord(event_.get(), side_) == cuda::kSuccess)
      (void)cuda::driver().StreamWaitEvent(caller_, event_.get(), 0);
  }
  void open() { is_open_ = true; }
  void close() { is_open_ = false; }

 private:
  cuda::StreamHandle caller_;
  cuda::StreamHandle side_;
  const cuda::Event& event_;
  bool is_open_ = false;  // an untouched side is in no capture: its events must stay out too
};

}  // namespace

/// A caller's communication stream and events for one run. They go back as soon as the steps are
/// launched: a wait is for the record that it found, whoever records the event next.
class Pipeline::Lease {
 public:
  Lease(Pipeline& pipeline, cuda::StreamHandle caller, int events) : pipeline_(pipeline) {
    const auto count = static_cast<size_t>(events);
    std::lock_guard lock(pipeline.mutex_);
    events_.reserve(count);
    while (events_.size() < count && !pipeline.events_.empty()) {
      events_.push_back(std::move(pipeline.events_.back()));
      pipeline.events_.pop_back();
    }
    for (; events_.size() < count; ++pipeline.made_) events_.emplace_back();
    pipeline.events_.reserve(pipeline.made_);  // giving back cannot fail
    side_ = &pipeline.side_of(caller);
    ++side_->users;
  }
  Lease(const Lease&) = delete;
  Lease& operator=(const Lease&) = delete;
  ~Lease() {
    std::lock_guard lock(pipeline_.mutex_);
    --side_->users;
    for (cuda::Event& event : events_) pipeline_.events_.push_back(std::move(event));
  }
  cuda::StreamHandle stream() const { return side_->stream.get(); }
  const cuda::Event& event(int index) const { return events_[static_cast<size_t>(index)]; }

 private:
  Pipeline& pipeline_;
  Side* side_ = nullptr;
  std::vector<cuda::Event> events_;
};

Pipeline::Side& Pipeline::side_of(cuda::StreamHandle caller) {
  auto found = std::ranges::find(sides_, caller, &Side::caller);
  if (found == sides_.end() && sides_.size() >= kMostSides) {
    for (auto side = sides_.begin(); side != sides_.end(); ++side) {
      if (side->users > 0 || cuda::is_capturing(side->stream.get())) continue;
      if (found == sides_.end() || side->last_use < found->last_use) found = side;
    }
    if (found != sides_.end()) found->caller = caller;
  }
  Side& side = found != sides_.end()
                   ? *found
                   : sides_.emplace_back(Side{caller, cuda::Stream(/*is_urgent=*/true)});
  side.last_use = ++uses_;
  return side;
}

void Pipeline::run(const Schedule& schedule, cuda::StreamHandle caller, const Launches& launches) {
  const cuda::Current current(device_);
  if (!schedule.is_overlapped()) {
    for (const Step& step : schedule.steps) launch(schedule, step, caller, launches);
    return;
  }
  const Lease lease(*this, caller, schedule.events);
  Fork fork(caller, lease.stream(), lease.event(0));
  for (const Step& step : schedule.steps) {
    const bool is_side = step.lane == Lane::kCommunication;
    const cuda::StreamHandle stream = is_side ? lease.stream() : caller;
    if (step.waits != kNoEvent) lease.event(step.waits).wait_on(stream);
    if (is_side) fork.open();
    launch(schedule, step, stream, launches);
    if (step.records != kNoEvent) lease.event(step.records).record(stream);
  }
  fork.close();
}

}  // namespace tp_native::overlap
