// SPDX-License-Identifier: Apache-2.0
// Several products at once: what a layer runs is tuned together and travels together.
#include <algorithm>

#include "kernels/gemm_choice.h"

namespace tp_native::kernels {
namespace {

/// The first of each kind that computes something, in order: the same on every rank whose products
/// are alike.
std::vector<Gemm> distinct(std::span<const Gemm> products) {
  std::vector<Gemm> found;
  std::vector<GemmKey> keys;
  for (const Gemm& g : products) {
    if (g.m == 0 || g.n == 0 || g.k == 0) continue;
    check(g);
    const GemmKey key = key_of(current_lt_device(), g);
    if (std::ranges::find(keys, key) != keys.end()) continue;
    keys.push_back(key);
    found.push_back(g);
  }
  return found;
}

}  // namespace

GemmTunings tune_all(std::span<const Gemm> products, cuda::StreamHandle stream, int candidates) {
  GemmTunings all;
  for (const Gemm& g : distinct(products)) {
    const GemmTuning tuning = tune(g, stream, candidates);
    all.heuristic_us.push_back(tuning.us.front());
    all.best_us.push_back(tuning.us[static_cast<size_t>(tuning.best)]);
    const std::vector<std::byte> choice = export_choice(g);
    all.choices.insert(all.choices.end(), choice.begin(), choice.end());
  }
  return all;
}

void import_all(std::span<const Gemm> products, std::span<const std::byte> choices) {
  const std::vector<Gemm> wanted = distinct(products);
  const size_t bytes = wanted.empty() ? 0 : choices.size() / wanted.size();
  TPN_CHECK(bytes * wanted.size() == choices.size(), choices.size(), " bytes of choices for ",
            wanted.size(), " products: they are not alike on the ranks");
  for (size_t i = 0; i < wanted.size(); ++i)
    import_choice(wanted[i], choices.subspan(i * bytes, bytes));
}

}  // namespace tp_native::kernels
