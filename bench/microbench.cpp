// SPDX-License-Identifier: Apache-2.0
// tpn_microbench: the shm communicator in native loops beside the physical limits of the machine,
// in the same processes. Knows neither torch nor Python.
#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

#include <charconv>
#include <cstdio>

#include "cases.h"
#include "comm/backends.h"
#include "gpu/run.h"
#include "report.h"

namespace tp_native::bench {
namespace {

constexpr int64_t kLargestBytes = 256 << 20;
constexpr const char* kHelp =
    "usage: tpn_microbench [--ranks N] [--sizes A,B,...] [--quick] [--json PATH]\n"
    "       tpn_microbench --gpu ...      the GPU's kernels; see --gpu --help\n"
    "Times the shared-memory collectives of tp_native between N processes of this host, beside\n"
    "what the hardware allows: flag latency, memcpy, reading lines a peer has written, exchange.\n"
    "Every result is verified. Collectives are timed in producer/consumer mode: a local write of\n"
    "the input before, a local read of the output after, the cost of these two copies subtracted.\n"
    "\n"
    "  --ranks N      processes, 2 to 16 (default 2)\n"
    "  --sizes A,B    bytes per rank, multiples of 8, K and M allowed (default 256 to 4M)\n"
    "  --quick        few sizes, 9 short rounds\n"
    "  --json PATH    write all figures to PATH as well\n";

struct BadArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

int64_t parse_number(const std::string& name, const std::string& text, bool allow_suffix) {
  int64_t value = 0;
  const char* const end = text.data() + text.size();
  const auto [rest, error] = std::from_chars(text.data(), end, value);
  const std::string suffix(rest, end);
  const int shift = suffix == "K" ? 10 : suffix == "M" ? 20 : 0;
  if (error != std::errc() || (!suffix.empty() && (shift == 0 || !allow_suffix)) ||
      value > kLargestBytes) {
    throw BadArgument(concat(name, ": \"", text, "\" is not a number that fits here"));
  }
  return value << shift;
}

std::vector<int64_t> parse_sizes(const std::string& text) {
  std::vector<int64_t> sizes;
  std::istringstream parts(text + ",");
  for (std::string part; std::getline(parts, part, ',');) {
    const int64_t bytes = parse_number("--sizes", part, true);
    if (bytes < 8 || bytes > kLargestBytes || bytes % 8 != 0) {
      throw BadArgument(concat("--sizes: ", part, ", expected multiples of 8 from 8 to 256M"));
    }
    sizes.push_back(bytes);
  }
  return sizes;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw BadArgument(name + " needs a value");
      return argv[++i];
    };
    if (name == "--quick") {
      options.is_quick = true;
    } else if (name == "--json") {
      options.json = value();
    } else if (name == "--sizes") {
      options.sizes = parse_sizes(value());
    } else if (name == "--ranks") {
      const std::string text = value();
      const int64_t ranks = parse_number(name, text, false);
      if (ranks < 2 || ranks > kMostRanks)
        throw BadArgument(concat("--ranks: ", text, ", expected 2 to ", kMostRanks));
      options.ranks = static_cast<int>(ranks);
    } else {
      throw BadArgument("unknown argument \"" + name + "\"; see --help");
    }
  }
  if (options.sizes.empty()) {
    options.sizes = options.is_quick ? parse_sizes("256,64K,1M")
                                     : parse_sizes("256,1K,4K,8K,16K,64K,256K,512K,1M,4M");
  }
  return options;
}

/// `unchecked`: the same ranks without fingerprints, flight record and arrivals.
Rows run_rank(World& world, comm::Communicator& communicator, comm::Communicator& unchecked,
              const Options& options) {
  const Plan plan = options.is_quick ? Plan{9, 5e-4} : Plan{};
  Rows rows;
  std::vector<Candidate> latencies{
      {"barrier", batch_of([&] { communicator.barrier(0, {}); }), {}},
      {"flag_round_trip", batch_of(FlagRoundTrip(world)), {}},
      {"unchecked/barrier", batch_of([&] { unchecked.barrier(0, {}); }), {}}};
  std::vector<float> small(64, 0.0f);
  const auto reduce = [&small](comm::Communicator& c) {
    const int64_t shape[] = {64};
    c.all_reduce({.op = comm::OpCode::kAllReduce, .dtype = DType::kFloat32, .shape = shape},
                 small.data(), small.data(), 64, {}, {});
  };
  latencies.push_back({"checked/all_reduce", batch_of([&] { reduce(communicator); }), {}});
  latencies.push_back({"unchecked/all_reduce", batch_of([&] { reduce(unchecked); }), {}});
  add_rows(0, latencies, measure(world, latencies, plan), rows);
  for (const int64_t bytes : options.sizes) {
    Cases cases(world, communicator, bytes);
    std::vector<Candidate> candidates;
    cases.add_all_reduce("private", candidates);
    if (cases.has_shared()) cases.add_all_reduce("shared", candidates);
    cases.add_all_gather(candidates);
    cases.add_broadcast(candidates);
    cases.add_memcpy(candidates);
    const auto size = static_cast<size_t>(bytes);
    candidates.push_back(
        {"exchange/stores", batch_of(Exchange(world, size, Mover::kLoadsAndStores)), {}});
    candidates.push_back({"exchange/memcpy", batch_of(Exchange(world, size, Mover::kMemcpy)), {}});
    candidates.push_back({"read_peer", ReadPeer(world, size, now_s), {}});
    add_rows(bytes, candidates, measure(world, candidates, plan), rows);
    add_exchange(bytes, rows);
  }
  return rows;
}

/// One core per rank, where there are enough: beside a busy neighbour the scheduler keeps both
/// ranks on one core (flag round trip 208 us). After make_shm, which counts the cores to choose its
/// waits.
void pin_rank(World& world) {
  cpu_set_t allowed;
  TPN_SYS(::sched_getaffinity(0, sizeof(allowed), &allowed), "asking for the cores");
  if (CPU_COUNT(&allowed) < world.size) {
    world.spins = 64;
    return;
  }
  int cpu = 0;
  for (int skip = world.rank; !CPU_ISSET(cpu, &allowed) || skip-- > 0;) ++cpu;
  cpu_set_t mine;
  CPU_ZERO(&mine);
  CPU_SET(cpu, &mine);
  TPN_SYS(::sched_setaffinity(0, sizeof(mine), &mine), "pinning rank ", world.rank);
}

int run_child(World& world, int rank, const std::string& address, const Options& options) {
  try {
    world.rank = rank;
    const comm::Identity identity{rank, world.size, "microbench", "shm", 0, 60};
    const auto communicator = comm::make_shm(identity, {address, 30});
    comm::Identity other = identity;
    other.name = "unchecked";
    const auto unchecked = comm::make_shm(
        other, {.address = address + "-unchecked", .init_timeout_s = 30, .is_checked = false});
    pin_rank(world);
    const Rows rows = run_rank(world, *communicator, *unchecked, options);
    if (rank == 0) write_results(rows, options);
    communicator->barrier(0, {});
    unchecked->close();
    communicator->close();
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tpn_microbench: rank %d: %s\n", rank, error.what());
    return 1;
  }
}

/// Forks the ranks and waits; the first failure ends them all.
int run_ranks(const Options& options) {
  const int64_t most = *std::max_element(options.sizes.begin(), options.sizes.end());
  World world(options.ranks, static_cast<size_t>(most));
  uint64_t nonce = 0;
  TPN_SYS(::getrandom(&nonce, sizeof(nonce), 0), "drawing an address");
  const std::string address = concat("tpn_microbench-", ::getpid(), "-", nonce);
  const pid_t parent = ::getpid();
  std::vector<pid_t> children;
  for (int rank = 0; rank < options.ranks; ++rank) {
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(1);  // it died before the prctl
      const int status = run_child(world, rank, address, options);
      std::fflush(nullptr);
      ::_exit(status);
    }
    if (pid < 0) std::fprintf(stderr, "tpn_microbench: fork: %s\n", std::strerror(errno));
    children.push_back(pid);
    if (pid < 0) break;
  }
  bool has_failed = children.back() < 0;
  const auto end_all = [&] {
    for (const pid_t pid : children)
      if (pid > 0) ::kill(pid, SIGKILL);
  };
  if (has_failed) end_all();
  int status = 0;
  for (pid_t pid; (pid = ::waitpid(-1, &status, 0)) > 0 || errno == EINTR;) {
    if (pid < 0) continue;
    std::replace(children.begin(), children.end(), pid, pid_t{-1});
    if (!has_failed && status != 0) {
      has_failed = true;
      if (WIFSIGNALED(status))
        std::fprintf(stderr, "tpn_microbench: a rank was killed by signal %d\n", WTERMSIG(status));
      end_all();
    }
  }
  return has_failed ? 1 : 0;
}

int run(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--help" || std::string_view(argv[i]) == "-h") {
      std::fputs(kHelp, stdout);
      return 0;
    }
  }
  try {
    const Options options = parse(argc, argv);
    if (!options.json.empty()) {  // known before a minute is spent; what is there stays for now
      const int fd = ::open(options.json.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0666);
      if (fd < 0)
        throw BadArgument(
            concat("--json: cannot write ", options.json, ": ", std::strerror(errno)));
      ::close(fd);
    }
    return run_ranks(options);
  } catch (const BadArgument& error) {
    std::fprintf(stderr, "tpn_microbench: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tpn_microbench: %s\n", error.what());
    return 1;
  }
}

}  // namespace
}  // namespace tp_native::bench

int main(int argc, char** argv) {
  using namespace tp_native::bench;  // NOLINT
  for (int i = 1; i < argc; ++i)
    if (std::string_view(argv[i]) == "--gpu") return gpu::run(argc, argv);
  return run(argc, argv);
}
