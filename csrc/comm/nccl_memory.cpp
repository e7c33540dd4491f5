// SPDX-License-Identifier: Apache-2.0
// NcclCommunicator's memory that collectives need not copy. A symmetric window lies at one offset
// on all ranks, and NCCL counts that offset on each rank for itself: windows are therefore made and
// given up at the same place of all ranks' sequence of calls, never when a tensor happens to die.
#include <algorithm>
#include <limits>
#include <utility>

#include "comm/nccl_communicator.h"
#include "comm/signature.h"
#include "core/callbacks.h"

namespace tp_native::comm {
namespace {

using nccl::Registration;

// How long ranks whose registration another one did not join may need to notice it themselves.
constexpr double kJoinSeconds = 2;
constexpr size_t kMostOffered = 64;  // windows that one call may give up: bits of a word

bool is_refused(int64_t result) { return result != nccl::kSuccess && result != nccl::kInProgress; }

/// Element `at` of each rank's `width` words.
std::vector<int64_t> column(const std::vector<int64_t>& words, size_t width, size_t at) {
  std::vector<int64_t> values;
  for (size_t i = at; i < words.size(); i += width) values.push_back(words[i]);
  return values;
}

int first_rank(const std::vector<int64_t>& words, bool (*is_it)(int64_t)) {
  const auto found = std::ranges::find_if(words, is_it);
  return found == words.end() ? -1 : static_cast<int>(found - words.begin());
}

std::string result_text(const nccl::Api& api, int64_t result) {
  return concat(api.GetErrorString(static_cast<int>(result)), " (", result, ")");
}

/// The ranks ask for unlike amounts: the verdict that the watch would come to.
Verdict unlike(const std::vector<int64_t>& bytes) {
  std::vector<Announcement> told;
  for (const int64_t& n : bytes) {
    told.push_back({.fingerprint = static_cast<uint64_t>(n),
                    .op = static_cast<uint8_t>(OpCode::kEmptyShared),
                    .dtype = static_cast<uint8_t>(DType::kUInt8),
                    .shape = std::span(&n, 1)});
  }
  const Mismatch found = find_mismatch(told);
  return {FailureKind::kMismatch, found.culprit, found.text};
}

}  // namespace

/// A block, and what NCCL knows of it.
struct NcclCommunicator::Kept {
  void* data = nullptr;
  void* handle = nullptr;  ///< NCCL writes a window's from a thread of its own, until it is ready
  Registration by = Registration::kNone;
  bool is_released = true;    ///< by its tensor, or it has none yet
  bool is_forgotten = false;  ///< the group has ended
};

void NcclCommunicator::limit_registration(Registration most) {
  best_registration_ = std::min(best_registration_, most);
}

Stats NcclCommunicator::stats() const {
  Stats stats = DeviceCommunicator::stats();
  std::lock_guard lock(nccl_mutex_);
  for (const auto& block : blocks_) {
    if (block->is_released) continue;
    int64_t& count = block->by == Registration::kWindow   ? stats.windows
                     : block->by == Registration::kBuffer ? stats.registered
                                                          : stats.unregistered;
    ++count;
  }
  return stats;
}

Block NcclCommunicator::allocate(int64_t bytes) {
  if (nccl::registration_of(api_) == Registration::kNone || bytes <= 0) return {};
  const int64_t shape[] = {bytes};
  std::shared_ptr<Kept> made;
  MemoryFailure failure;
  collective({.op = OpCode::kEmptyShared, .shape = shape}, 0, 0, [&] {
    const cuda::Current current(device());
    made = allocate_alike(bytes, failure);
    board().finish(seq());
  });
  TPN_CHECK(made, "ncclMemAlloc of ", bytes, " bytes failed on rank ", failure.rank, ": ",
            result_text(api_, failure.result));
  {
    std::lock_guard lock(nccl_mutex_);
    made->is_released = made->is_forgotten;
  }
  if (made->is_released) check();  // it failed meanwhile, and has freed the block
  TPN_CHECK(!made->is_released, "group ", identity_.name, " ended during empty_shared");
  Block block;
  block.data = made->data;
  const auto self = std::static_pointer_cast<NcclCommunicator>(shared_from_this());
  block.owner = std::shared_ptr<void>(block.data, [weak = std::weak_ptr(self), api = &api_,
                                                   device = device(), made](void* data) noexcept {
    try {
      const PlainErrors plain;
      const cuda::Current on(device);
      (void)cuda::driver().CtxSynchronize();  // collectives may still be writing
      if (const auto owner = weak.lock()) {
        owner->give_back(made);
      } else {
        (void)api->MemFree(data);
      }
    } catch (const std::exception&) {  // the device has gone, and its memory with it
    }
  });
  return block;
}

/// The same amount on all ranks, known to NCCL in the same way; or null on all of them.
std::shared_ptr<NcclCommunicator::Kept> NcclCommunicator::allocate_alike(int64_t bytes,
                                                                         MemoryFailure& failure) {
  constexpr OpCode kOp = OpCode::kEmptyShared;
  const int64_t wanted[] = {bytes, static_cast<int64_t>(best_registration_),
                            static_cast<int64_t>(released_windows())};
  const std::vector<int64_t> offers = tell_all(kOp, wanted);
  const std::vector<int64_t> amounts = column(offers, 3, 0);
  if (std::ranges::any_of(amounts, [&](int64_t n) { return n != bytes; }))
    fail_group(unlike(amounts));
  best_registration_ = static_cast<Registration>(std::ranges::min(column(offers, 3, 1)));
  uint64_t released = ~uint64_t{0};
  for (const int64_t mask : column(offers, 3, 2)) released &= static_cast<uint64_t>(mask);
  if (!give_up_windows(released)) limit_registration(Registration::kBuffer);

  auto block = std::make_shared<Kept>();
  const int64_t got[] = {api_.MemAlloc(&block->data, static_cast<size_t>(bytes)),
                         static_cast<int64_t>(best_registration_)};
  if (got[0] == nccl::kSuccess) {
    std::lock_guard lock(nccl_mutex_);
    blocks_.push_back(block);  // a failure from here on gives it back
  }
  const std::vector<int64_t> answers = tell_all(kOp, got);
  const std::vector<int64_t> results = column(answers, 2, 0);
  best_registration_ = static_cast<Registration>(std::ranges::min(column(answers, 2, 1)));
  failure.rank = first_rank(results, is_refused);
  if (failure.rank >= 0) {
    failure.result = static_cast<int>(results[static_cast<size_t>(failure.rank)]);
    if (got[0] == nccl::kSuccess) give_back(block);
    return nullptr;
  }
  Registration by = best_registration_;
  if (by == Registration::kWindow) by = make_window(*block, bytes);
  if (by == Registration::kBuffer) (void)register_buffer(*block, bytes);
  return block;
}

/// kWindow; kBuffer where there are none between these GPUs; kNone where a rank's call failed.
Registration NcclCommunicator::make_window(Kept& block, int64_t bytes) {
  constexpr OpCode kOp = OpCode::kEmptyShared;
  int result = nccl::kInternalError;
  std::string text;
  {
    std::lock_guard lock(nccl_mutex_);
    if (handle_)
      result = api_.CommWindowRegister(handle_, block.data, static_cast<size_t>(bytes),
                                       &block.handle, nccl::kSymmetricWindow);
    if (is_refused(result)) text = nccl::text_of(api_, result, handle_);
  }
  const int64_t answer[] = {result};
  const std::vector<int64_t> answers = tell_all(kOp, answer);
  const int refused = first_rank(answers, is_refused);
  if (!is_refused(result)) {
    result = outcome(result, refused < 0 ? std::numeric_limits<double>::infinity() : kJoinSeconds);
    if (result == nccl::kInProgress) {
      fail_group({FailureKind::kError, refused,
                  concat("ncclCommWindowRegister failed on rank ", refused, ": ",
                         result_text(api_, answers[static_cast<size_t>(refused)]),
                         "; the other ranks' does not end without it; TP_NATIVE_NCCL_WINDOWS=0 "
                         "does without symmetric windows")});
    }
    if (result != nccl::kSuccess) fail_call("CommWindowRegister", result);
  }
  const bool is_held = !is_refused(result) && block.handle != nullptr;
  const int64_t held[] = {is_held};
  const std::vector<int64_t> holders = tell_all(kOp, held);
  if (is_held) {
    std::lock_guard lock(nccl_mutex_);
    block.by = Registration::kWindow;
  }
  if (std::ranges::all_of(holders, [](int64_t n) { return n != 0; })) return Registration::kWindow;
  if (is_held && deregister(block) != nccl::kSuccess) limit_registration(Registration::kBuffer);
  if (refused < 0) {
    limit_registration(Registration::kBuffer);  // NCCL says so of the machine: asked once
    return Registration::kBuffer;
  }
  if (refused == identity_.rank) {
    warn(concat("group ", identity_.name, ": ncclCommWindowRegister of ", bytes,
                " bytes failed on rank ", refused, ": ", text,
                "; this memory is registered on no rank, and collectives on it copy"));
  }
  return Registration::kNone;
}

Registration NcclCommunicator::register_buffer(Kept& block, int64_t bytes) {
  int result = nccl::kInternalError;
  std::string text;
  {
    std::lock_guard lock(nccl_mutex_);
    if (handle_)
      result = api_.CommRegister(handle_, block.data, static_cast<size_t>(bytes), &block.handle);
    if (is_refused(result)) text = nccl::text_of(api_, result, handle_);
  }
  if (result == nccl::kInProgress) await_ready("CommRegister", result);
  if (!is_refused(result)) {
    std::lock_guard lock(nccl_mutex_);
    block.by = Registration::kBuffer;
  }
  const int64_t answer[] = {result};
  const int refused = first_rank(tell_all(OpCode::kEmptyShared, answer), is_refused);
  if (refused < 0) return Registration::kBuffer;
  (void)deregister(block);
  if (refused == identity_.rank) {
    warn(concat("group ", identity_.name, ": ncclCommRegister of ", bytes, " bytes failed on rank ",
                refused, ": ", text,
                "; this memory is registered on no rank, and collectives on it copy"));
  }
  return Registration::kNone;
}

// ---- giving back

/// Which of the first windows no tensor holds here; bit i is window i, the same on all ranks.
uint64_t NcclCommunicator::released_windows() {
  std::lock_guard lock(nccl_mutex_);
  uint64_t released = 0;
  size_t i = 0;
  for (const auto& block : blocks_) {
    if (block->by != Registration::kWindow) continue;
    if (block->is_released) released |= uint64_t{1} << i;
    if (++i == kMostOffered) break;
  }
  return released;
}

/// Those that no rank holds any more. False if NCCL would not: its offsets may differ from the
/// other ranks' now.
bool NcclCommunicator::give_up_windows(uint64_t which) {
  std::vector<std::shared_ptr<Kept>> windows;
  {
    std::lock_guard lock(nccl_mutex_);
    for (const auto& block : blocks_) {
      if (block->by == Registration::kWindow && windows.size() < kMostOffered)
        windows.push_back(block);
    }
  }
  bool is_clean = true;
  for (size_t i = 0; i < windows.size(); ++i) {
    if (((which >> i) & 1) == 0) continue;
    if (deregister(*windows[i]) == nccl::kSuccess) {
      give_back(windows[i]);
    } else {  // perhaps mapped still: its memory stays until the group ends
      is_clean = false;
    }
  }
  return is_clean;
}

/// What the library said; nothing is registered afterwards as far as we know.
int NcclCommunicator::deregister(Kept& block) {
  int result = nccl::kSuccess;
  {
    std::lock_guard lock(nccl_mutex_);
    const Registration by = block.by;
    void* const handle = std::exchange(block.handle, nullptr);
    block.by = Registration::kNone;
    if (!handle_ || by == Registration::kNone) return result;
    result = by == Registration::kWindow ? api_.CommWindowDeregister(handle_, handle)
                                         : api_.CommDeregister(handle_, handle);
  }
  if (result != nccl::kInProgress) return result;
  await_ready("CommDeregister", result);
  return nccl::kSuccess;
}

/// Of a tensor that has ended, or of memory that never got one. From any thread; waits for nobody.
void NcclCommunicator::give_back(const std::shared_ptr<Kept>& block) noexcept {
  {
    std::lock_guard lock(nccl_mutex_);
    if (std::exchange(block->is_released, true) && block->is_forgotten) return;  // end() frees it
    if (block->by == Registration::kWindow) return;  // until all ranks agree, or end() comes
    if (handle_ && block->by == Registration::kBuffer)
      (void)api_.CommDeregister(handle_, block->handle);
    block->by = Registration::kNone;
    std::erase(blocks_, block);
  }
  free_block(*block);
}

void NcclCommunicator::free_block(Kept& block) noexcept { (void)api_.MemFree(block.data); }

/// The group ends, under the lock: all registrations with it. Returns what is to be freed once NCCL
/// has ended; blocks that tensors hold are theirs.
std::vector<std::shared_ptr<NcclCommunicator::Kept>> NcclCommunicator::forget_blocks(
    bool is_orderly, nccl::Handle handle) noexcept {
  for (const auto& block : blocks_) {
    if (handle && is_orderly && block->by == Registration::kWindow)
      (void)api_.CommWindowDeregister(handle, block->handle);
    if (handle && is_orderly && block->by == Registration::kBuffer)
      (void)api_.CommDeregister(handle, block->handle);
    block->by = Registration::kNone;
    block->is_forgotten = true;
  }
  std::erase_if(blocks_, [](const auto& block) { return !block->is_released; });
  return std::exchange(blocks_, {});
}

}  // namespace tp_native::comm
