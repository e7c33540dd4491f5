// SPDX-License-Identifier: Apache-2.0
// Memory limits of control groups, who is called slow, and what errors say.
// TSan: no processes.
#include <array>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>

#include "check.h"
#include "comm/limits.h"
#include "comm/signature.h"
#include "comm/skew.h"
#include "core/error.h"

using namespace tp_native::comm;  // NOLINT

namespace {

/// A made-up control group tree in a folder of its own, removed at the end.
struct Tree {
  std::filesystem::path root;
  Tree() {
    std::string pattern = (std::filesystem::temp_directory_path() / "tpn-limits-XXXXXX").string();
    root = ::mkdtemp(pattern.data());
  }
  ~Tree() { std::filesystem::remove_all(root); }
  void write(const std::string& path, const std::string& text) const {
    std::filesystem::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text;
  }
  int64_t headroom() const { return memory_headroom(root.string(), (root / "self").string()); }
};

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

}  // namespace

TEST(without_a_limit_there_is_no_bound) {
  const Tree tree;
  CHECK_EQ(tree.headroom(), kNone);
  tree.write("self", "0::/job\n");
  CHECK_EQ(tree.headroom(), kNone);
  tree.write("job/memory.max", "max\n");
  CHECK_EQ(tree.headroom(), kNone);
  tree.write("job/memory.max", "nonsense\n");
  CHECK_EQ(tree.headroom(), kNone);
}

TEST(the_tightest_of_a_group_and_its_parents_binds) {
  const Tree tree;
  tree.write("self", "0::/slice/job\n");
  tree.write("slice/job/memory.max", "1000000\n");
  tree.write("slice/job/memory.current", "400000\n");
  tree.write("slice/job/memory.stat", "anon 300000\ninactive_file 100000\n");
  CHECK_EQ(tree.headroom(), int64_t{700000});  // page cache can go
  tree.write("slice/memory.max", "1000000\n");
  tree.write("slice/memory.current", "900000\n");
  CHECK_EQ(tree.headroom(), int64_t{100000});
  tree.write("memory.max", "5000\n");  // inside a container the root is the container's own
  tree.write("memory.current", "9000\n");
  CHECK_EQ(tree.headroom(), int64_t{0});
}

TEST(version_1_of_control_groups_is_read_too) {
  const Tree tree;
  tree.write("self", "4:cpu,cpuacct:/x\n3:memory:/job\n0::/\n");
  tree.write("memory/job/memory.limit_in_bytes", "800\n");
  tree.write("memory/job/memory.usage_in_bytes", "500\n");
  CHECK_EQ(tree.headroom(), int64_t{300});
}

TEST(a_rank_half_as_fast_is_called_slow_within_50_collectives_and_once) {
  Skew skew;
  skew.set_floor(10);
  std::vector<int> told;
  uint64_t now = 1000;
  for (int step = 0; step < 200; ++step) {
    const uint64_t arrived[] = {now + 1000, now + 2000, now + 1003};
    if (const int slow = skew.add(arrived, 3); slow >= 0) {
      CHECK(step < 50);
      told.push_back(slow);
    }
    now += 2000;
  }
  CHECK(told == std::vector<int>{1});
  CHECK(skew.share(1) > 0.45 && skew.share(1) < 0.55 && skew.share(0) == 0);
}

TEST(quiet_steps_with_pauses_of_any_rank_raise_at_most_one_false_alarm_in_10000) {
  int alarms = 0;
  for (const uint32_t seed : {1u, 2u, 3u, 4u}) {
    std::mt19937 rng(seed);
    Skew skew;
    skew.set_floor(100);
    uint64_t now = 0;
    for (int step = 0; step < 10000; ++step) {
      uint64_t arrived[4];
      uint64_t last = 0;
      for (uint64_t& at : arrived) {
        at = now + 1000 + rng() % 300;                         // noise
        if (rng() % 200 == 0) at += 1000 * (1 + rng() % 100);  // descheduled
        last = std::max(last, at);
      }
      alarms += skew.add(arrived, 4) >= 0;
      now = last;
    }
  }
  CHECK(alarms <= 4);
}

TEST(all_ranks_are_prompt_until_the_floor_is_known) {
  Skew skew;
  CHECK(!skew.has_floor());
  for (uint64_t now = 1000; now < 500'000; now += 2000) {
    const uint64_t arrived[] = {now, now + 1000};
    CHECK_EQ(skew.add(arrived, 2), -1);
  }
  CHECK_EQ(skew.share(1), 0.0);
}

TEST(texts_are_cut_between_two_characters) {
  for (const size_t room : {1u, 2u, 3u, 4u, 5u, 6u, 7u, 8u}) {
    std::string to(room, 'x');
    tp_native::copy_text(to, "a\u00e9\u20ac");  // 1, 2 and 3 bytes
    const size_t length = ::strnlen(to.data(), room);
    CHECK_EQ(length, room <= 1 ? 0u : room <= 3 ? 1u : room <= 6 ? 3u : 6u);
  }
}

TEST(a_mismatch_says_what_is_not_known_and_what_reads_alike) {
  const int64_t shape[] = {3};
  const Announcement known{.fingerprint = 1, .shape = shape};
  Announcement other = known;
  other.fingerprint = 2;
  CHECK(find_mismatch(std::array{known, other}).text.find("what reads alike") != std::string::npos);
  other.is_known = false;
  const std::string text = find_mismatch(std::array{known, other}).text;
  CHECK(text.find("rank 1 an operation that it has not noted yet") != std::string::npos);
  CHECK(text.find("what reads alike") == std::string::npos);
}

TEST(descriptor_limits_are_told_with_figures) {
  const std::string text = describe_descriptor_limit(7);
  CHECK(text.starts_with("needs 7 file descriptors, ") && text.find(" are open") != text.npos);
}

int main() { return check::run_all(); }
