// SPDX-License-Identifier: Apache-2.0
// What the GPU benchmarks found, as a table and as JSON: figures, and the bars that they reach or
// miss.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "gpu/scene.h"

namespace tp_native::bench::gpu {

/// Of the command line.
struct Options {
  bool is_quick = false;
  std::string json;
  std::string commit = "unknown";
  std::vector<std::string> libraries;  ///< folders that hold cuBLASLt and NCCL, to look in last
  std::vector<std::string> only;       ///< parts to run; empty: all
};

/// Figures beside a time: {"tflop_per_s", 700}.
using More = std::vector<std::pair<std::string, double>>;

class Report {
 public:
  void begin(const std::string& part);
  void add(const std::string& name, const Timing& timing, More more = {});
  /// A figure that must be at most, or at least, `bar`.
  void at_most(const std::string& id, const std::string& what, double figure, double bar);
  void at_least(const std::string& id, const std::string& what, double figure, double bar);
  void fail(const std::string& part, const std::string& why);
  bool has_failed() const { return !failures_.empty(); }
  void print_bars() const;
  void write_json(const std::string& path, const Scene& scene, const Options& options) const;

 private:
  struct Row {
    std::string part, name;
    Timing timing;
    More more;
  };
  struct Bar {
    std::string id, what;
    double figure, bar;
    bool is_floor;
    bool is_reached() const { return is_floor ? figure >= bar : figure <= bar; }
  };
  void add_bar(Bar bar);

  std::string part_;
  std::vector<Row> rows_;
  std::vector<Bar> bars_;
  std::vector<std::pair<std::string, std::string>> failures_;
};

// The parts, each with what it measures in its file.
void run_gemm(Scene& scene, Report& report);
void run_swiglu(Scene& scene, Report& report);
void run_chunks(Scene& scene, Report& report);
void run_overlap(Scene& scene, Report& report);
void run_all_reduce(Scene& scene, Report& report);
void run_host(Scene& scene, Report& report, const Options& options);

}  // namespace tp_native::bench::gpu
