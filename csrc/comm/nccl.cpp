// SPDX-License-Identifier: Apache-2.0
// Backend "nccl": what the ranks must agree on before NCCL is asked for anything, so that a rank
// that cannot take part is an error on all of them and not a wait.
#include <cstring>
#include <fstream>

#include "comm/backends.h"
#include "comm/host_board.h"
#include "comm/introduction.h"
#include "comm/nccl_communicator.h"
#include "comm/signature.h"
#include "core/callbacks.h"

namespace tp_native::comm {
namespace {

/// What every rank tells the others. Bytes from another process: texts are ended by who reads them.
struct Hello {
  int32_t version = 0;  ///< NCCL's
  uint64_t host = 0;
  char bus_id[32] = "";
  char error[464] = "";  ///< why this rank cannot
  nccl::UniqueId id = {};
};
static_assert(std::is_trivially_copyable_v<Hello>);

uint64_t host_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  std::getline(file, text);
  return hash_text(text);
}

Hello introduce(const Identity& identity, const NcclOptions& options) {
  const PlainErrors plain;
  Hello hello;
  try {
    const nccl::Api& api = nccl::api(options.search);
    const cuda::Device device(options.device);
    hello.version = api.version;
    hello.host = host_id();
    copy_text(hello.bus_id, device.bus_id());
    if (identity.rank == 0) {
      const cuda::Current current(device);
      const int result = api.GetUniqueId(&hello.id);
      TPN_CHECK(result == nccl::kSuccess,
                "ncclGetUniqueId failed: ", nccl::text_of(api, result, nullptr));
    }
  } catch (const std::exception& error) {
    copy_text(hello.error, error.what());
  }
  return hello;
}

void check(const std::vector<Hello>& ranks, bool is_gpu_shared) {
  const std::string errors = errors_of(ranks);
  TPN_CHECK(errors.empty(), "backend \"nccl\" cannot start: ", errors);
  for (size_t r = 1; r < ranks.size(); ++r) {
    TPN_CHECK(ranks[r].version == ranks[0].version, "rank ", r, " has NCCL ",
              nccl::version_text(ranks[r].version), ", rank 0 has ",
              nccl::version_text(ranks[0].version), ": install the same one everywhere");
    for (size_t other = 0; other < r && !is_gpu_shared; ++other) {
      TPN_CHECK(ranks[r].host != ranks[other].host ||
                    std::strcmp(ranks[r].bus_id, ranks[other].bus_id) != 0,
                "ranks ", other, " and ", r, " are on one GPU, ", ranks[r].bus_id,
                ": start at most as many ranks on a host as it has GPUs, or see the README on "
                "ranks that share a GPU for tests");
    }
  }
}

}  // namespace

bool is_available(const std::string& backend) {
  std::string why;
  return backend == "shm" || backend == "local" || (backend == "nccl" && cuda::is_available(why));
}

std::shared_ptr<Communicator> make_nccl(const NcclOptions& options,
                                        const std::shared_ptr<Communicator>& control,
                                        std::shared_ptr<Board> board) {
  Identity identity = control->identity();
  control->barrier(options.init_timeout_s, {});  // all have come: the rest takes no time
  std::vector<Hello> ranks = introduce_all(*control, introduce(identity, options));
  for (Hello& rank : ranks) rank.bus_id[sizeof(rank.bus_id) - 1] = '\0';
  check(ranks, options.is_gpu_shared);
  std::unique_ptr<PeerMemory> peers;
  if (options.peer_bytes > 0 && kernels::cuda::is_built() && identity.size > 1)
    peers =
        std::make_unique<PeerMemory>(cuda::Device(options.device), *control, options.peer_bytes);
  if (!board) {
    auto host = std::dynamic_pointer_cast<HostCommunicator>(control);
    TPN_CHECK(host, "ranks on several hosts need a board");
    board = std::make_shared<HostBoard>(std::move(host));
  }
  identity.backend = "nccl";
  identity.device = options.device;
  auto communicator = std::make_shared<NcclCommunicator>(
      identity, nccl::api(), cuda::Device(options.device), control, std::move(board));
  communicator->limit_registration(options.registration);
  nccl::Config config;
  if (options.max_ctas > 0) config.max_ctas = options.max_ctas;
  communicator->connect(ranks[0].id, config, options.init_timeout_s);
  if (peers) communicator->use_peers(std::move(peers));
  return communicator;
}

}  // namespace tp_native::comm
