// SPDX-License-Identifier: Apache-2.0
#include "comm/flight.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <ctime>
#include <filesystem>

#include "core/fault.h"
#include "core/unique.h"

namespace tp_native::comm {
namespace {

uint64_t pack(const Signature& s) {
  const auto byte = [](auto value) { return static_cast<uint64_t>(static_cast<uint8_t>(value)); };
  const size_t dims = std::min<size_t>(s.shape.size(), kMaxDims);
  return byte(s.op) | byte(s.dtype) << 8 | byte(s.reduce) << 16 | byte(s.root) << 24 |
         byte(s.dim) << 32 | byte(dims) << 40;
}

/// Whoever reads a word of the next operation here (acquire) reads a `seq` that differs after it.
FlightCopy copy(const FlightEntry& entry) {
  constexpr auto kAcquire = std::memory_order_acquire;
  FlightCopy out;
  out.seq = entry.seq.load(kAcquire);
  const uint64_t code = entry.code.load(kAcquire);
  out.signature = entry.signature.load(kAcquire);
  out.chain = entry.chain.load(kAcquire);
  out.bytes = entry.bytes.load(kAcquire);
  out.start = entry.start.load(kAcquire);
  out.end = entry.end.load(kAcquire);
  out.op = static_cast<OpCode>(code & 0xff);
  out.dtype = static_cast<DType>(code >> 8 & 0xff);
  out.reduce = static_cast<ReduceOp>(code >> 16 & 0xff);
  out.root = static_cast<int8_t>(code >> 24 & 0xff);
  out.dim = static_cast<int8_t>(code >> 32 & 0xff);
  const size_t dims = std::min<size_t>(code >> 40 & 0xff, kMaxDims);
  for (size_t i = 0; i < dims; ++i) out.shape.push_back(entry.shape[i].load(kAcquire));
  if (entry.seq.load(std::memory_order_relaxed) != out.seq) out.seq = 0;  // its owner was faster
  return out;
}

/// `text` as the inside of a JSON string.
std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) < 0x20) {
      out += ' ';
    } else {
      out += c;
    }
  }
  return out;
}

const char* name(FailureKind kind) {
  constexpr const char* kNames[] = {"error",   "peer_lost", "mismatch",
                                    "timeout", "aborted",   "interrupted"};
  return kNames[static_cast<size_t>(kind)];
}

/// "0.123456789", or "null" for an operation that has not ended.
std::string seconds(uint64_t at, double period_s, uint64_t origin) {
  if (at == 0) return "null";
  char text[32];
  std::snprintf(text, sizeof(text), "%.9f",
                static_cast<double>(static_cast<int64_t>(at - origin)) * period_s);
  return text;
}

void append(std::string& out, const FlightCopy& e, double period_s, uint64_t origin) {
  out += concat("{\"seq\":", e.seq, ",\"op\":\"", comm::name(e.op), "\",\"dtype\":\"",
                tp_native::name(e.dtype), "\",\"reduce\":\"", tp_native::name(e.reduce),
                "\",\"root\":", e.root, ",\"dim\":", e.dim, ",\"shape\":[");
  for (size_t i = 0; i < e.shape.size(); ++i) out += concat(i ? "," : "", e.shape[i]);
  out += concat("],\"bytes\":", e.bytes, ",\"signature\":\"", std::hex, e.signature, std::dec,
                "\",\"start_s\":", seconds(e.start, period_s, origin),
                ",\"end_s\":", seconds(e.end, period_s, origin), "}");
}

std::string to_json(const Identity& identity, std::span<RankHeader* const> headers,
                    FailureKind kind, int culprit, const std::string& text,
                    const StampClock& clock) {
  const uint64_t now = stamp();
  const double period_s = clock.period_s();
  char when[32];
  const std::time_t wall = std::time(nullptr);
  std::tm utc{};
  ::gmtime_r(&wall, &utc);
  (void)std::strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", &utc);
  std::string out = concat("{\"format\":\"tp_native flight record\",\"version\":1,\"group\":\"",
                           escaped(identity.name), "\",\"backend\":\"", identity.backend,
                           "\",\"generation\":", identity.generation, ",\"size\":", identity.size,
                           ",\"written\":\"", when, "\",\"reporter\":", identity.rank,
                           ",\"failure\":{\"kind\":\"", name(kind), "\",\"culprit\":", culprit,
                           ",\"text\":\"", escaped(text), "\"},\n\"ranks\":[");
  for (int r = 0; r < identity.size; ++r) {
    const RankHeader& header = *headers[static_cast<size_t>(r)];
    const bool has_left =
        header.state.load(std::memory_order_acquire) == static_cast<uint32_t>(RankState::kLeft);
    out += concat(r ? ",\n" : "\n", "{\"rank\":", r, ",\"pid\":", header.pid,
                  ",\"has_left\":", has_left ? "true" : "false",
                  ",\"heartbeats\":", header.pulse.load(std::memory_order_relaxed),
                  ",\"operations\":[");
    bool is_first = true;
    for (const FlightCopy& entry : all_flight(header.flight)) {
      out += is_first ? "\n" : ",\n";
      is_first = false;
      append(out, entry, period_s, now);  // seconds before the record: negative
    }
    out += "]}";
  }
  return out + "]}\n";
}

}  // namespace

void begin_flight(FlightRing& ring, uint64_t seq, const Signature& signature, uint64_t hash,
                  uint64_t chain, int64_t bytes, uint64_t start) {
  const Signature& s = named(signature);
  constexpr auto kRelease = std::memory_order_release;
  FlightEntry& entry = ring.entries[seq % kFlightEntries];
  entry.seq.store(0, std::memory_order_relaxed);
  entry.signature.store(hash, kRelease);
  entry.chain.store(chain, kRelease);
  entry.code.store(pack(s), kRelease);
  entry.bytes.store(static_cast<uint64_t>(bytes), kRelease);
  entry.start.store(start, kRelease);
  entry.end.store(0, kRelease);
  const size_t dims = std::min<size_t>(s.shape.size(), kMaxDims);
  for (size_t i = 0; i < dims; ++i) entry.shape[i].store(s.shape[i], kRelease);
  entry.seq.store(seq, kRelease);
  ring.noted.store(seq, kRelease);
}

FlightCopy copy_flight(const FlightRing& ring, uint64_t seq) {
  FlightCopy found = copy(ring.entries[seq % kFlightEntries]);
  if (found.seq != seq) found.seq = 0;
  return found;
}

FlightCopy last_flight(const FlightRing& ring) {
  const uint64_t last = ring.noted.load(std::memory_order_acquire);
  return last == 0 ? FlightCopy{} : copy_flight(ring, last);
}

std::vector<FlightCopy> all_flight(const FlightRing& ring) {
  std::vector<FlightCopy> entries;
  for (const FlightEntry& entry : ring.entries) {
    if (FlightCopy found = copy(entry); found.seq != 0) entries.push_back(std::move(found));
  }
  std::ranges::sort(entries, {}, &FlightCopy::seq);
  return entries;
}

Announcement announcement_of(const FlightCopy& e, uint64_t fingerprint) {
  return {fingerprint,
          static_cast<uint8_t>(e.op),
          static_cast<uint8_t>(e.dtype),
          static_cast<uint8_t>(e.reduce),
          e.root,
          e.dim,
          e.shape,
          e.seq != 0};
}

std::optional<Mismatch> compare_flights(std::span<const FlightRing* const> ranks,
                                        uint64_t& compared) {
  uint64_t common = ~uint64_t{0};
  for (const FlightRing* ring : ranks)
    common = std::min(common, ring->noted.load(std::memory_order_acquire));
  if (common == compared) return std::nullopt;
  std::vector<FlightCopy> notes(ranks.size());
  const auto copy_all = [&](uint64_t seq) {
    std::ranges::transform(ranks, notes.begin(),
                           [&](const FlightRing* ring) { return copy_flight(*ring, seq); });
    return std::ranges::all_of(notes, [](const FlightCopy& note) { return note.seq != 0; });
  };
  if (!copy_all(common)) return std::nullopt;  // a rank is far ahead: the chain tells it later
  const auto agree = [&](const auto& field) {
    return std::ranges::all_of(
        notes, [&](const FlightCopy& note) { return note.*field == notes[0].*field; });
  };
  if (agree(&FlightCopy::chain)) {
    compared = common;
    return std::nullopt;
  }
  const uint64_t oldest = common - std::min(common, kFlightEntries) + 1;
  for (uint64_t seq = std::max(compared + 1, oldest); seq <= common; ++seq) {
    if (!copy_all(seq) || agree(&FlightCopy::signature)) continue;
    std::vector<Announcement> told;
    for (const FlightCopy& note : notes) told.push_back(announcement_of(note, note.signature));
    Mismatch found = find_mismatch(told);
    found.text = concat("#", seq, ": ", found.text);
    return found;
  }
  return Mismatch{-1, concat("the ranks entered different collectives between #", compared + 1,
                             " and #", common, ", too long ago to be noted still")};
}

std::string flight_path(const Identity& identity, const RankHeader& first) {
  if (identity.flight_folder.empty()) return {};
  char file[80];
  std::snprintf(file, sizeof(file), "/flight-%016llx-%llu-%d.json",
                static_cast<unsigned long long>(first.group),
                static_cast<unsigned long long>(identity.generation), first.pid);
  return identity.flight_folder + file;
}

void write_flight_record(const Identity& identity, std::span<RankHeader* const> headers,
                         FailureKind kind, int culprit, const std::string& text,
                         const StampClock& clock) noexcept {
  try {
    const std::string path = flight_path(identity, *headers[0]);
    if (path.empty() || ::access(path.c_str(), F_OK) == 0) return;
    TPN_FAULT("flight.write");
    const std::string json = to_json(identity, headers, kind, culprit, text, clock);
    std::error_code ignored;
    std::filesystem::create_directories(identity.flight_folder, ignored);
    const std::string draft = concat(path, ".", ::getpid());  // readers see all of it or nothing
    const Fd file(
        ::open(draft.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!file) return;
    size_t done = 0;
    while (done < json.size()) {
      const ssize_t n = ::write(file.get(), json.data() + done, json.size() - done);
      if (n <= 0 && errno != EINTR) break;
      done += n > 0 ? static_cast<size_t>(n) : 0;
    }
    if (done < json.size() || ::rename(draft.c_str(), path.c_str()) != 0) ::unlink(draft.c_str());
  } catch (...) {  // the failure itself is what has to be told
  }
}

}  // namespace tp_native::comm
