// SPDX-License-Identifier: Apache-2.0
// Forked ranks without torch or Python under deaths, stops and delays at the protocol's fault
// points and at random moments.      usage: test_fault_soak [trials [seed]]
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>

#include "check.h"
#include "comm/backends.h"
#include "core/callbacks.h"
#include "core/clock.h"
#include "core/error.h"
#include "core/fault.h"
#include "core/unique.h"

using namespace tp_native;        // NOLINT
using namespace tp_native::comm;  // NOLINT

namespace {

constexpr int kOperations = 60;
constexpr double kFrozenSeconds = 0.6;
constexpr double kNever = 1e9;

enum class Fault { kKill, kStop, kDelay, kRandomKill };

/// What one rank leaves for the parent, in memory that outlives it.
struct Report {
  volatile int operation;  ///< the last one begun, from 0; -1: still joining
  volatile bool has_failed;
  volatile double at_s;
  volatile FailureKind kind;
  volatile int peer;
  volatile uint64_t seq;
  char op[32];
  char message[256];
};

struct Trial {
  int size;
  int victim;
  Fault fault;
  std::string spec;
  uint32_t seed;
  int random_us;
};

/// The n-th operation of a trial: the same on all ranks.
OpCode operation(const Trial& trial, int n, int64_t& count) {
  constexpr OpCode kOps[] = {OpCode::kAllReduce, OpCode::kAllReduce,     OpCode::kAllGather,
                             OpCode::kBroadcast, OpCode::kReduceScatter, OpCode::kBarrier,
                             OpCode::kGather,    OpCode::kScatter};
  std::mt19937 rng(trial.seed * 1000 + static_cast<uint32_t>(n));
  constexpr int64_t kCounts[] = {1, 20, 300, 3000, 20000, 150000};
  count = kCounts[rng() % 6];
  return kOps[rng() % 8];
}

void expect(const float* data, int64_t count, float value) {
  for (int64_t i = 0; i < count; ++i) {
    if (data[i] != value) fail(concat("element ", i, " is ", data[i], ", expected ", value));
  }
}

void run_operation(Communicator& c, const Trial& trial, int n) {
  int64_t count = 0;
  const OpCode op = operation(trial, n, count);
  const int size = c.identity().size;
  const int me = c.identity().rank;
  const float mine = static_cast<float>(me + 1);
  const float sum = static_cast<float>(size * (size + 1) / 2);
  const int root = n % size;
  const std::vector<int64_t> counts(static_cast<size_t>(size), count);
  const int64_t shape[] = {count * size};
  const Signature signature{.op = op, .dtype = DType::kFloat32, .root = root, .shape = shape};
  std::vector<float> in(static_cast<size_t>(count * size), mine);
  std::vector<float> out(static_cast<size_t>(count * size), -1);
  switch (op) {
    case OpCode::kAllReduce: {
      const Block block = c.allocate(count * 4);
      float* const data = block.data && n % 3 != 0 ? static_cast<float*>(block.data) : in.data();
      std::fill_n(data, count, mine);
      c.all_reduce(signature, data, data, count, {}, {});
      return expect(data, count, sum);
    }
    case OpCode::kAllGather:
      c.all_gather(signature, in.data(), out.data(), 1, counts, {});
      for (int r = 0; r < size; ++r)
        expect(&out[static_cast<size_t>(count * r)], count, static_cast<float>(r + 1));
      return;
    case OpCode::kReduceScatter:
      c.reduce_scatter(signature, in.data(), out.data(), counts, {});
      return expect(out.data(), count, sum);
    case OpCode::kBroadcast:
      c.broadcast(signature, in.data(), count, {});
      return expect(in.data(), count, static_cast<float>(root + 1));
    case OpCode::kGather:
      c.gather(signature, in.data(), out.data(), counts, {});
      for (int r = 0; me == root && r < size; ++r)
        expect(&out[static_cast<size_t>(count * r)], count, static_cast<float>(r + 1));
      return;
    case OpCode::kScatter:
      c.scatter(signature, in.data(), out.data(), counts, {});
      return expect(out.data(), count, static_cast<float>(root + 1));
    default:
      return c.barrier(0, {});
  }
}

int run_rank(const Trial& trial, const std::string& address, int rank, Report& report) {
  try {
    const bool is_victim = rank == trial.victim;
    if (is_victim && trial.spec.starts_with("meet.")) fault::arm(trial.spec);
    const auto c = make_shm(Identity{rank, trial.size, "soak", "shm", 0, 20, {}},
                            {address, 1, kFrozenSeconds});
    report.operation = 0;
    if (is_victim && !trial.spec.starts_with("meet.")) fault::arm(trial.spec);
    for (int n = 0; n < kOperations; ++n) {
      report.operation = n;
      run_operation(*c, trial, n);
    }
    c->barrier(0, {});
    c->close();
    return 0;
  } catch (const Error& error) {
    report.at_s = now_s();
    report.kind = error.record().kind;
    report.peer = error.record().peer;
    report.seq = error.record().seq;
    std::strncpy(report.op, error.record().op.c_str(), sizeof(report.op) - 1);
    std::strncpy(report.message, error.what(), sizeof(report.message) - 1);
    report.has_failed = true;
    return 10;
  }
}

bool has_ended(pid_t pid, double deadline_s) {
  const Fd process(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  pollfd p{process.get(), POLLIN, 0};
  for (;;) {
    const double left = deadline_s - now_s();
    if (::poll(&p, 1, static_cast<int>(std::clamp(left * 1e3, 0.0, 1e4))) > 0) return true;
    if (left <= 0) return false;
  }
}

struct Tally {
  int reached = 0;
  std::map<std::string, int> by_site;
  std::vector<double> kill_s;
  std::vector<double> stop_s;
};

void check_survivor(const Trial& trial, const Report& report, int rank) {
  const std::string who = concat("rank ", rank, " of ", trial.size, ", fault ", trial.spec,
                                 " on rank ", trial.victim, ", seed ", trial.seed, ": ");
  if (!report.has_failed) check::fail(__FILE__, __LINE__, who + "did not fail");
  if (report.operation < 0) {  // the group was never made: a plain error says so
    if (std::strstr(report.message, "rank") == nullptr)
      check::fail(__FILE__, __LINE__, who + report.message);
    return;
  }
  const std::string told =
      concat(who, "kind ", static_cast<int>(report.kind), " peer ", report.peer, ' ', report.op,
             " #", report.seq, ": ", report.message);
  if (report.kind != FailureKind::kPeerLost || report.peer != trial.victim)
    check::fail(__FILE__, __LINE__, told + ": wrong culprit");
  int64_t count = 0;
  const bool is_last = report.operation == kOperations - 1;  // or the barrier after it
  const OpCode op = operation(trial, report.operation, count);
  if (report.seq != static_cast<uint64_t>(report.operation) + 2 &&
      !(is_last && report.seq == kOperations + 2))
    check::fail(__FILE__, __LINE__,
                told + concat(": wrong sequence, operation ", report.operation));
  if (std::strcmp(report.op, name(op)) != 0 && !is_last)
    check::fail(__FILE__, __LINE__, told + concat(": wrong operation, expected ", name(op)));
}

void run_trial(const Trial& trial, const std::string& address, Report* reports, Tally& tally) {
  std::vector<pid_t> pids;
  std::fflush(stdout);
  for (int rank = 0; rank < trial.size; ++rank) {
    reports[rank] = Report{};
    reports[rank].operation = -1;
    const pid_t pid = ::fork();
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      int status = 99;
      try {
        status = run_rank(trial, address, rank, reports[rank]);
      } catch (const std::exception& error) {
        std::fprintf(stderr, "rank %d: %s\n", rank, error.what());
      }
      ::_exit(status);
    }
    pids.push_back(pid);
  }
  const pid_t victim = pids[static_cast<size_t>(trial.victim)];
  double struck_s = kNever;
  if (trial.fault == Fault::kRandomKill) {
    ::usleep(static_cast<useconds_t>(trial.random_us));
    struck_s = now_s();
    ::kill(victim, SIGKILL);
  }
  int status = 0;
  bool is_stopped = false;
  const double deadline_s = now_s() + 20;
  for (;;) {  // WUNTRACED tells of the stop at once
    const pid_t got = ::waitpid(victim, &status, WUNTRACED | WNOHANG);
    if (got == victim) break;
    if (now_s() > deadline_s) break;
    ::usleep(100);
  }
  is_stopped = WIFSTOPPED(status);
  if (struck_s == kNever) struck_s = now_s();
  std::vector<int> hung;
  for (int rank = 0; rank < trial.size; ++rank) {
    if (rank != trial.victim && !has_ended(pids[static_cast<size_t>(rank)], deadline_s))
      hung.push_back(rank);
  }
  if (is_stopped) {  // it wakes up in a group that has given it up
    ::kill(victim, SIGCONT);
    if (!has_ended(victim, now_s() + 10)) hung.push_back(trial.victim);
  }
  for (const int rank : hung) ::kill(pids[static_cast<size_t>(rank)], SIGKILL);
  const bool is_dead = !is_stopped && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
  for (int rank = 0; rank < trial.size; ++rank) {
    if (rank != trial.victim || is_stopped) ::waitpid(pids[static_cast<size_t>(rank)], nullptr, 0);
  }
  if (!hung.empty())
    check::fail(__FILE__, __LINE__,
                concat("rank ", hung[0], " of ", trial.size, " hung: ", trial.spec, " on rank ",
                       trial.victim, ", seed ", trial.seed));
  if (!is_dead && !is_stopped) {  // the point was not reached, or only a delay
    CHECK(WIFEXITED(status));
    if (WEXITSTATUS(status) != 0)
      check::fail(__FILE__, __LINE__, concat(trial.spec, ": ", reports[trial.victim].message));
    for (int rank = 0; rank < trial.size; ++rank) CHECK(!reports[rank].has_failed);
    tally.reached += trial.fault == Fault::kDelay;
    return;
  }
  bool all_done = is_dead;  // killed after its last operation: nobody needed it any more
  for (int rank = 0; rank < trial.size; ++rank)
    all_done = all_done && (rank == trial.victim || !reports[rank].has_failed);
  if (all_done && reports[trial.victim].operation == kOperations - 1) return;
  ++tally.reached;
  ++tally.by_site[trial.spec.substr(0, trial.spec.find(':'))];
  for (int rank = 0; rank < trial.size; ++rank) {
    if (rank == trial.victim) continue;
    check_survivor(trial, reports[rank], rank);
    if (reports[rank].operation >= 0)
      (is_dead ? tally.kill_s : tally.stop_s).push_back(reports[rank].at_s - struck_s);
  }
}

void print_delays(const char* what, std::vector<double> seconds) {
  if (seconds.empty()) return;
  std::sort(seconds.begin(), seconds.end());
  const auto at = [&](double q) {
    return seconds[static_cast<size_t>(q * static_cast<double>(seconds.size() - 1))] * 1e3;
  };
  std::printf("        %s: %zu survivors, p50 %.1f ms, p99 %.1f ms, worst %.1f ms\n", what,
              seconds.size(), at(0.5), at(0.99), at(1));
}

int g_trials = 60;
uint32_t g_seed = 1;

}  // namespace

TEST(every_survivor_of_a_fault_names_culprit_operation_and_sequence) {
  auto* const reports = static_cast<Report*>(::mmap(
      nullptr, 16 * sizeof(Report), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
  std::vector<std::string> sites;
  std::stringstream all(fault::sites());
  for (std::string site; std::getline(all, site, ',');)
    sites.push_back(site.substr(site.find_first_not_of(' ')));
  std::mt19937 rng(g_seed);
  Tally tally;
  for (int t = 0; tally.reached < g_trials; ++t) {
    Trial trial;
    trial.seed = rng();
    trial.size = 2 + static_cast<int>(rng() % 3);
    trial.victim = static_cast<int>(rng() % static_cast<uint32_t>(trial.size));
    trial.random_us = static_cast<int>(rng() % 12000);
    const uint32_t kind = rng() % 20;
    trial.fault = kind < 9    ? Fault::kKill
                  : kind < 16 ? Fault::kRandomKill
                  : kind < 19 ? Fault::kStop
                              : Fault::kDelay;
    const std::string& site = sites[rng() % sites.size()];
    const bool is_once = site.starts_with("meet.") || site == "leave" || site == "abort.publish";
    const int nth = is_once ? 1 : 1 + static_cast<int>(rng() % 50);
    if (trial.fault == Fault::kStop && site.starts_with("meet.")) continue;  // init's own deadline
    if (site == "leave" || site == "abort.publish") continue;  // covered below and by the model
    const char* const action = trial.fault == Fault::kStop    ? "stop"
                               : trial.fault == Fault::kDelay ? "delay=30"
                                                              : "kill";
    trial.spec = trial.fault == Fault::kRandomKill ? "" : concat(site, ':', nth, ':', action);
    run_trial(trial, concat("tpn-soak-", ::getpid(), '-', t), reports, tally);
  }
  std::printf("        %d faults:", tally.reached);
  for (const auto& [site, count] : tally.by_site)
    std::printf(" %s %d", site.empty() ? "random" : site.c_str(), count);
  std::printf("\n");
  print_delays("killed", tally.kill_s);
  print_delays("frozen, limit 600 ms", tally.stop_s);
  if (tally.kill_s.size() > 20) {
    std::sort(tally.kill_s.begin(), tally.kill_s.end());
    CHECK(tally.kill_s[tally.kill_s.size() * 99 / 100] <= 0.1);
  }
  for (const double s : tally.stop_s) CHECK(s <= kFrozenSeconds + 0.5);
}

int main(int argc, char** argv) {
  Callbacks quiet;  // 600 warnings of frozen ranks say nothing here
  quiet.warn = [](const std::string&) {};
  install_callbacks(quiet);
  if (argc > 1) g_trials = std::atoi(argv[1]);
  if (argc > 2) g_seed = static_cast<uint32_t>(std::atoi(argv[2]));
  return check::run_all();
}
