// SPDX-License-Identifier: Apache-2.0
#include "gpu/run.h"

#include <cstdio>
#include <fstream>
#include <sstream>
#include <stdexcept>

#include "gpu/report.h"
#include "kernels/cublaslt_api.h"

namespace tp_native::bench::gpu {
namespace {

constexpr const char* kHelp =
    "usage: tpn_microbench --gpu [--quick] [--json PATH] [--only PART,...] [--libraries DIR:...]\n"
    "                            [--commit TEXT]\n"
    "Times the GPU kernels of tp_native on one GPU, beside a copy within its memory and beside "
    "the\n"
    "same work done in separate steps. Ranks and links are stand-ins: no figure says what several\n"
    "GPUs reach. Every result is verified.\n"
    "\n"
    "  --quick          few sizes, 5 short rounds\n"
    "  --json PATH      write all figures to PATH as well\n"
    "  --only A,B       of memory, gemm, swiglu, chunks, overlap, all_reduce, host\n"
    "  --libraries A:B  folders to look for cuBLASLt and NCCL in, after the usual places\n"
    "  --commit TEXT    what was built, for the JSON\n";

struct BadArgument : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Part {
  const char* name;
  std::function<void(Scene&, Report&, const Options&)> run;
};

void run_memory(Scene& scene, Report& report) {
  const double rate = scene.copy_bytes_per_s();
  const double seconds = 2.0 * static_cast<double>(int64_t{1} << 30) / rate;
  report.add("copy", {seconds, seconds}, {{"gb_per_s", rate * 1e-9}});
}

const std::vector<Part>& parts() {
  const auto plain = [](void (*run)(Scene&, Report&)) {
    return [run](Scene& scene, Report& report, const Options&) { run(scene, report); };
  };
  static const std::vector<Part> all = {{"memory", plain(run_memory)},
                                        {"host", run_host},
                                        {"gemm", plain(run_gemm)},
                                        {"swiglu", plain(run_swiglu)},
                                        {"chunks", plain(run_chunks)},
                                        {"overlap", plain(run_overlap)},
                                        {"all_reduce", plain(run_all_reduce)}};
  return all;
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> pieces;
  std::istringstream stream(text);
  for (std::string piece; std::getline(stream, piece, separator);)
    if (!piece.empty()) pieces.push_back(piece);
  return pieces;
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 == argc) throw BadArgument(name + " needs a value");
      return argv[++i];
    };
    if (name == "--gpu") continue;
    if (name == "--quick") {
      options.is_quick = true;
    } else if (name == "--json") {
      options.json = value();
    } else if (name == "--commit") {
      options.commit = value();
    } else if (name == "--libraries") {
      options.libraries = split(value(), ':');
    } else if (name == "--only") {
      options.only = split(value(), ',');
      for (const std::string& part : options.only)
        if (std::ranges::find(parts(), part, &Part::name) == parts().end())
          throw BadArgument(concat("--only: no part \"", part, "\"; see --gpu --help"));
    } else {
      throw BadArgument("unknown argument \"" + name + "\"; see --gpu --help");
    }
  }
  if (!options.json.empty() && !std::ofstream(options.json, std::ios::app))
    throw BadArgument("--json: cannot write " + options.json);
  return options;
}

int measure(const Options& options) {
  Scene scene(0, options.is_quick);
  Report report;
  std::printf("tp_native %s on %s, CUDA %d.%d driver, cuBLASLt %zu; bf16, every result verified\n",
              TPN_VERSION, scene.device().name().c_str(), cuda::driver().version / 1000,
              cuda::driver().version % 1000 / 10, cublaslt::api().version);
  for (const Part& part : parts()) {
    if (!options.only.empty() && std::ranges::find(options.only, part.name) == options.only.end())
      continue;
    report.begin(part.name);
    try {
      part.run(scene, report, options);
    } catch (const std::exception& error) {  // the others may still tell something
      report.fail(part.name, error.what());
    }
  }
  report.print_bars();
  if (!options.json.empty()) report.write_json(options.json, scene, options);
  return report.has_failed() ? 1 : 0;
}

}  // namespace

int run(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::string_view(argv[i]) == "--help") {
      std::fputs(kHelp, stdout);
      return 0;
    }
  }
  try {
    const Options options = parse(argc, argv);
    std::string why;
    if (!options.libraries.empty()) cublaslt::search_in(options.libraries);
    if (!cuda::is_available(why) || !cublaslt::is_available(why)) {
      std::fprintf(stderr, "tpn_microbench --gpu: skipped: %s\n", why.c_str());
      return kSkipped;
    }
    return measure(options);
  } catch (const BadArgument& error) {
    std::fprintf(stderr, "tpn_microbench: %s\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "tpn_microbench: %s\n", error.what());
    return 1;
  }
}

}  // namespace tp_native::bench::gpu
