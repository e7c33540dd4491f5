// SPDX-License-Identifier: Apache-2.0
// tpn_microbench's figures, what they add up to beside the physical limits, as a table and as JSON.
#pragma once

#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iomanip>
#include <sstream>
#include <string_view>

#include "kernels/reduce.h"
#include "rounds.h"

namespace tp_native::bench {

struct Options {
  int ranks = 2;
  std::vector<int64_t> sizes;
  bool is_quick = false;
  std::string json;
};

struct Row {
  int64_t bytes;  ///< per rank; 0: has no size
  std::string name;
  Timing gross;
  Timing net;  ///< producer/consumer mode: without the copies
};

using Rows = std::vector<Row>;

constexpr const char* kPrivate = "all_reduce/private/producer_consumer";
constexpr const char* kShared = "all_reduce/shared/producer_consumer";

inline const Row* find(const Rows& rows, int64_t bytes, const std::string& name) {
  for (const Row& row : rows)
    if (row.bytes == bytes && row.name == name) return &row;
  return nullptr;
}

inline void add_rows(int64_t bytes, const std::vector<Candidate>& candidates,
                     const std::vector<Timing>& timings, Rows& rows) {
  constexpr std::string_view kMode = "/producer_consumer";
  for (size_t i = 0; i < candidates.size(); ++i) {
    Row row{bytes, candidates[i].name, timings[i], timings[i]};
    if (row.name.ends_with(kMode)) {  // its copies come next
      row.net.best_s -= timings[i + 1].best_s;
      row.net.median_s -= timings[i + 1].median_s;
      for (size_t r = 0; r < row.net.rounds_s.size(); ++r)
        row.net.rounds_s[r] -= timings[i + 1].rounds_s[r];
    }
    rows.push_back(std::move(row));
  }
}

/// The limit is the faster of the two ways to exchange.
inline void add_exchange(int64_t bytes, Rows& rows) {
  std::vector<double> seconds = find(rows, bytes, "exchange/stores")->net.rounds_s;
  const std::vector<double>& other = find(rows, bytes, "exchange/memcpy")->net.rounds_s;
  for (size_t r = 0; r < seconds.size(); ++r) seconds[r] = std::min(seconds[r], other[r]);
  const Timing timing = summarise(std::move(seconds));
  rows.push_back({bytes, "exchange", timing, timing});
}

/// Limit over collective, both as times of the same payload: 1 is as fast as the machine allows.
inline double fraction_of_bests(const Row& limit, const Row& row) {
  return limit.net.best_s / row.net.best_s;
}

/// The same, as the median of the rounds' own ratios: for a quiet machine whose hypervisor moves a
/// core in mid-run, after which flags and lines cost three times as much. Beside other work it
/// means nothing.
inline double fraction_of_rounds(const Row& limit, const Row& row) {
  std::vector<double> ratios;
  for (size_t r = 0; r < row.net.rounds_s.size(); ++r)
    ratios.push_back(limit.net.rounds_s[r] / row.net.rounds_s[r]);
  return median_of(std::move(ratios));
}

inline std::string cpu_model() {
  std::ifstream info("/proc/cpuinfo");
  for (std::string line; std::getline(info, line);)
    if (line.starts_with("model name")) return line.substr(line.find(':') + 2);
  return "unknown";
}

/// GB/s of payload: what one repetition moves, over its time.
inline double payload_bytes(const Row& row, int ranks) {
  const bool is_one_rank = row.name == "memcpy/one" || row.name == "read_peer";
  return static_cast<double>(row.bytes) * (is_one_rank ? 1 : ranks);
}

inline void write_timing(std::ostream& out, const char* prefix, const Timing& t) {
  out << ", \"" << prefix << "best_us\": " << t.best_s * 1e6 << ", \"" << prefix
      << "median_us\": " << t.median_s * 1e6;
}

/// What fingerprints, deadline, flight record and arrivals cost an operation: the median of the
/// rounds' own differences.
inline double checks_ns(const Rows& rows, const char* with, const char* without) {
  const std::vector<double>& checked = find(rows, 0, with)->net.rounds_s;
  const std::vector<double>& unchecked = find(rows, 0, without)->net.rounds_s;
  std::vector<double> differences;
  for (size_t r = 0; r < checked.size(); ++r)
    differences.push_back((checked[r] - unchecked[r]) * 1e9);
  return median_of(std::move(differences));
}

/// bus bandwidth as nccl-tests defines it.
inline void write_bandwidth(std::ostream& out, const Row& row, int ranks) {
  const bool is_gather = row.name.starts_with("all_gather");
  const double whole = static_cast<double>(row.bytes) * (is_gather ? ranks : 1);
  const double algorithm = whole / row.net.best_s / 1e9;
  const double share = static_cast<double>(ranks - 1) / ranks;
  const double factor = row.name.starts_with("all_reduce") ? 2 * share : is_gather ? share : 1;
  out << ", \"alg_gb_per_s\": " << algorithm << ", \"bus_gb_per_s\": " << algorithm * factor;
}

inline void write_json(std::ostream& out, const Rows& rows, const Options& options) {
  out << std::setprecision(6) << "{\n  \"program\": \"tpn_microbench\", \"version\": \""
      << TPN_VERSION << "\", \"ranks\": " << options.ranks
      << ", \"rounds\": " << rows.front().net.rounds_s.size()
      << ", \"quick\": " << (options.is_quick ? "true" : "false") << ",\n  \"cpu\": \""
      << cpu_model() << "\", \"cores\": " << ::sysconf(_SC_NPROCESSORS_ONLN)
      << ", \"reduce_isa\": \"" << kernels::reduce_isa()
      << "\", \"dtype\": \"float32\", \"verified\": true,\n  \"rows\": [";
  const char* separator = "\n";
  for (const Row& row : rows) {
    const size_t slash = row.name.find('/');
    const bool is_collective = row.name.find("/private") != std::string::npos ||
                               row.name.find("/shared") != std::string::npos;
    const bool is_copies = row.name.ends_with("/copies");
    out << separator << "    {\"name\": \"" << row.name << "\", \"op\": \""
        << row.name.substr(0, slash) << "\", \"bytes\": " << row.bytes;
    write_timing(out, "", row.net);
    out << ", \"spread\": " << row.gross.spread;
    if (row.name.ends_with("/producer_consumer")) write_timing(out, "gross_", row.gross);
    if (is_collective && !is_copies) {
      write_bandwidth(out, row, options.ranks);
    } else if (row.bytes > 0 && !is_copies) {
      out << ", \"payload_gb_per_s\": " << payload_bytes(row, options.ranks) / row.net.best_s / 1e9;
    }
    out << '}';
    separator = ",\n";
  }
  out << "\n  ],\n  \"fractions\": [";
  separator = "\n";
  for (const int64_t bytes : options.sizes) {
    const Row* const exchange = find(rows, bytes, "exchange");
    const Row* const read_peer = find(rows, bytes, "read_peer");
    const auto write = [&](const char* name, const Row* limit, const Row* row) {
      out << ", \"" << name << "\": " << fraction_of_bests(*limit, *row) << ", \"" << name
          << "_rounds\": " << fraction_of_rounds(*limit, *row);
    };
    out << separator << "    {\"bytes\": " << bytes;
    write("private_of_exchange", exchange, find(rows, bytes, kPrivate));
    if (const Row* const shared = find(rows, bytes, kShared)) {
      write("shared_of_exchange", exchange, shared);
      write("shared_of_read_peer", read_peer, shared);
    }
    out << '}';
    separator = ",\n";
  }
  const Row* const barrier = find(rows, 0, "barrier");
  const Row* const round_trip = find(rows, 0, "flag_round_trip");
  out << "\n  ],\n  \"barrier_over_one_way_flag\": "
      << 2 * barrier->net.best_s / round_trip->net.best_s
      << ",\n  \"checks_ns_per_barrier\": " << checks_ns(rows, "barrier", "unchecked/barrier")
      << ",\n  \"checks_ns_per_all_reduce_256_bytes\": "
      << checks_ns(rows, "checked/all_reduce", "unchecked/all_reduce") << "\n}\n";
}

inline std::string size_text(int64_t bytes) {
  if (bytes % (1 << 20) == 0) return concat(bytes >> 20, " MiB");
  if (bytes % (1 << 10) == 0) return concat(bytes >> 10, " KiB");
  return concat(bytes, " B");
}

inline std::string fixed(double value, int digits) {
  return concat(std::fixed, std::setprecision(digits), value);
}

inline void print_line(int64_t bytes, const Rows& rows, int ranks) {
  const Row* const exchange = find(rows, bytes, "exchange");
  const auto net_us = [&](const char* name) {
    const Row* const row = find(rows, bytes, name);
    return row ? fixed(row->net.best_s * 1e6, 2) : "-";
  };
  const auto gb_per_s = [&](const char* name) {
    const Row* const row = find(rows, bytes, name);
    return fixed(payload_bytes(*row, ranks) / row->net.best_s / 1e9, 1);
  };
  const auto of_limit = [&](const char* name) -> std::string {
    const Row* const row = find(rows, bytes, name);
    if (!row) return "-";
    return concat(fixed(fraction_of_bests(*exchange, *row), 2), " (",
                  fixed(fraction_of_rounds(*exchange, *row), 2), ")");
  };
  const std::string median = fixed(find(rows, bytes, kPrivate)->net.median_s * 1e6, 2);
  std::printf("%8s | %8s %10s %8s %8s %9s | %8s %9s %10s %10s | %12s %12s\n",
              size_text(bytes).c_str(), net_us(kPrivate).c_str(), concat("(", median, ")").c_str(),
              net_us(kShared).c_str(), net_us("all_gather/private/producer_consumer").c_str(),
              net_us("broadcast/private/producer_consumer").c_str(), gb_per_s("exchange").c_str(),
              gb_per_s("read_peer").c_str(), gb_per_s("memcpy/one").c_str(),
              gb_per_s("memcpy/all").c_str(), of_limit(kPrivate).c_str(),
              of_limit(kShared).c_str());
}

inline void print_table(const Rows& rows, const Options& options) {
  const Row* const barrier = find(rows, 0, "barrier");
  const Row* const round_trip = find(rows, 0, "flag_round_trip");
  std::printf(
      "tp_native %s, %d ranks on %ld cores, %s, reduce %s, float32, all results verified\n"
      "barrier %.2f us (median %.2f), flag round trip %.2f us: barrier = %.1f x one way\n"
      "fingerprint, flight record and arrivals: %.0f ns a barrier, %.0f ns an all-reduce of 256 "
      "B\n\n",
      TPN_VERSION, options.ranks, ::sysconf(_SC_NPROCESSORS_ONLN), cpu_model().c_str(),
      kernels::reduce_isa(), barrier->net.best_s * 1e6, barrier->net.median_s * 1e6,
      round_trip->net.best_s * 1e6, 2 * barrier->net.best_s / round_trip->net.best_s,
      checks_ns(rows, "barrier", "unchecked/barrier"),
      checks_ns(rows, "checked/all_reduce", "unchecked/all_reduce"));
  std::printf("%8s | %47s | %40s | %25s\n", "", "us net of copies, best (median)",
              "limits, GB/s of payload", "all_reduce, of limit");
  std::printf("%8s | %8s %10s %8s %8s %9s | %8s %9s %10s %10s | %12s %12s\n", "bytes", "private",
              "(median)", "shared", "gather", "broadcast", "exchange", "read peer", "memcpy one",
              "memcpy all", "private", "shared");
  for (const int64_t bytes : options.sizes) print_line(bytes, rows, options.ranks);
  std::printf(
      "\nof limit: the exchange's time over the collective's, of the bests (median of the rounds' "
      "own\n"
      "ratios). Private tensors end near 1; shared ones can pass it, they move half the lines.\n"
      "-: too small for shared blocks. With more ranks than cores the limits mean nothing.\n");
}

inline void write_results(const Rows& rows, const Options& options) {
  print_table(rows, options);
  if (options.json.empty()) return;
  std::ofstream out(options.json);
  write_json(out, rows, options);
  out.close();
  TPN_CHECK(out.good(), "cannot write ", options.json);
}

}  // namespace tp_native::bench
