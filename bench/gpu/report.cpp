// SPDX-License-Identifier: Apache-2.0
#include "gpu/report.h"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iomanip>

#include "comm/nccl_api.h"
#include "kernels/cublaslt_api.h"

namespace tp_native::bench::gpu {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += static_cast<unsigned char>(c) < ' ' ? ' ' : c;
  }
  return out + '"';
}

/// JSON has no infinity and no NaN.
std::string number(double value) {
  return std::isfinite(value) ? concat(std::setprecision(6), value) : "null";
}

}  // namespace

void Report::begin(const std::string& part) {
  part_ = part;
  std::printf("\n%-60s %10s %10s %7s\n", part.c_str(), "median us", "best us", "spread");
}

void Report::add(const std::string& name, const Timing& timing, More more) {
  std::printf("  %-58s %10.2f %10.2f %6.1f%%", name.c_str(), timing.median_s * 1e6,
              timing.best_s * 1e6, timing.spread * 100);
  for (const auto& [what, value] : more) std::printf("  %s %.4g", what.c_str(), value);
  std::printf("\n");
  std::fflush(stdout);
  rows_.push_back({part_, name, timing, std::move(more)});
}

void Report::add_bar(Bar bar) { bars_.push_back(std::move(bar)); }

void Report::at_most(const std::string& id, const std::string& what, double figure, double bar) {
  add_bar({id, what, figure, bar, false});
}

void Report::at_least(const std::string& id, const std::string& what, double figure, double bar) {
  add_bar({id, what, figure, bar, true});
}

void Report::fail(const std::string& part, const std::string& why) {
  std::fprintf(stderr, "tpn_microbench: %s: %s\n", part.c_str(), why.c_str());
  failures_.emplace_back(part, why);
}

void Report::print_bars() const {
  std::printf("\n%-4s %-70s %8s %10s\n", "bar", "", "figure", "asked");
  for (const Bar& bar : bars_) {
    std::printf("%-4s %-70s %8.3f %s %7.3f  %s\n", bar.id.c_str(), bar.what.c_str(), bar.figure,
                bar.is_floor ? ">=" : "<=", bar.bar, bar.is_reached() ? "reached" : "MISSED");
  }
}

void Report::write_json(const std::string& path, const Scene& scene, const Options& options) const {
  std::ofstream out(path);
  out << "{\n  \"program\": \"tpn_microbench --gpu\", \"version\": \"" << TPN_VERSION
      << "\", \"commit\": " << quoted(options.commit)
      << ", \"quick\": " << (scene.is_quick() ? "true" : "false")
      << ",\n  \"device\": " << quoted(scene.device().name())
      << ", \"multiprocessors\": " << scene.multiprocessors() << ", \"compute_capability\": \""
      << scene.device().attribute(75) << '.' << scene.device().attribute(76)
      << "\", \"driver_cuda\": " << cuda::driver().version
      << ", \"cublaslt\": " << cublaslt::api().version << ",\n  \"copy_gb_per_s\": ";
  const auto copy = std::ranges::find(rows_, "copy", &Row::name);
  out << (copy == rows_.end() ? "null" : number(copy->more.front().second))
      << ", \"dtype\": \"bfloat16\", \"data\": \"random\", \"l2\": \"operands in turn, 4 times its "
         "size\", \"rounds\": "
      << scene.plan().rounds << ", \"verified\": " << (has_failed() ? "false" : "true")
      << ",\n  \"rows\": [";
  const char* separator = "\n";
  for (const Row& row : rows_) {
    out << separator << "    {\"part\": " << quoted(row.part) << ", \"name\": " << quoted(row.name)
        << ", \"median_us\": " << number(row.timing.median_s * 1e6)
        << ", \"best_us\": " << number(row.timing.best_s * 1e6)
        << ", \"spread\": " << number(row.timing.spread);
    for (const auto& [what, value] : row.more) out << ", " << quoted(what) << ": " << number(value);
    out << '}';
    separator = ",\n";
  }
  out << "\n  ],\n  \"bars\": [";
  separator = "\n";
  for (const Bar& bar : bars_) {
    out << separator << "    {\"bar\": " << quoted(bar.id) << ", \"what\": " << quoted(bar.what)
        << ", \"figure\": " << number(bar.figure) << ", \""
        << (bar.is_floor ? "at_least" : "at_most") << "\": " << number(bar.bar)
        << ", \"reached\": " << (bar.is_reached() ? "true" : "false") << '}';
    separator = ",\n";
  }
  out << "\n  ],\n  \"failures\": [";
  separator = "\n";
  for (const auto& [part, why] : failures_) {
    out << separator << "    {\"part\": " << quoted(part) << ", \"why\": " << quoted(why) << '}';
    separator = ",\n";
  }
  out << "\n  ]\n}\n";
  out.close();
  TPN_CHECK(out.good(), "cannot write ", path);
}

}  // namespace tp_native::bench::gpu
