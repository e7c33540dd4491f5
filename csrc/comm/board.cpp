// SPDX-License-Identifier: Apache-2.0
#include "comm/board.h"

#include <sstream>

namespace tp_native::comm {

Late find_late(const std::vector<Status>& ranks, uint64_t seq) {
  Late late;
  int behind = -1;
  std::ostringstream text;
  text << "ranks:";
  for (size_t r = 0; r < ranks.size(); ++r) {
    const Status& s = ranks[r];
    const int rank = static_cast<int>(r);
    text << (r ? ", " : " ") << r;
    if (s.has_left) text << " left";
    if (!s.is_known && !s.has_left) {
      text << " does not answer";
      if (late.culprit < 0) late.culprit = rank;
    } else if (s.seq == 0) {
      text << " has called nothing yet";
    } else {
      text << (s.is_inside ? " is in " : " last called ") << name(s.op) << " #" << s.seq;
    }
    if (behind < 0 && s.seq < seq) behind = rank;
  }
  if (late.culprit < 0) late.culprit = behind;
  late.table = text.str();
  return late;
}

}  // namespace tp_native::comm
