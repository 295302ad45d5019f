#include "pagemap.h"

#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "support.h"

namespace {

// linux/fs.h has these from Linux 6.7 on; the headers may be older than the kernel.
struct PageRegion {
  uint64_t start;
  uint64_t end;
  uint64_t categories;
};

struct PmScanArg {
  uint64_t size;
  uint64_t flags;
  uint64_t start;
  uint64_t end;
  uint64_t walk_end;
  uint64_t vec;
  uint64_t vec_len;
  uint64_t max_pages;
  uint64_t category_inverted;
  uint64_t category_mask;
  uint64_t category_anyof_mask;
  uint64_t return_mask;
};

constexpr unsigned long kPagemapScan = _IOWR('f', 16, PmScanArg);
constexpr uint64_t kPageIsFile = 1 << 2;
constexpr uint64_t kPageIsPresent = 1 << 3;
constexpr uint64_t kPageIsSwapped = 1 << 4;

// Bits of an entry of the file.
constexpr uint64_t kEntryFile = 1ull << 61;
constexpr uint64_t kEntrySwapped = 1ull << 62;
constexpr uint64_t kEntryPresent = 1ull << 63;

void add(std::vector<uint32_t>& runs, size_t page, size_t pages) {
  if (!runs.empty() && runs[runs.size() - 2] + runs.back() == page) {
    runs.back() += static_cast<uint32_t>(pages);
    return;
  }
  runs.push_back(static_cast<uint32_t>(page));
  runs.push_back(static_cast<uint32_t>(pages));
}

/** PAGEMAP_SCAN, which skips what is not mapped. */
bool scan(int fd, const uint8_t* start, size_t length, std::vector<uint32_t>& runs) {
  PageRegion regions[256];
  uint64_t base = reinterpret_cast<uint64_t>(start);
  for (uint64_t at = base; at < base + length;) {
    PmScanArg argument = {};
    argument.size = sizeof(argument);
    argument.start = at;
    argument.end = base + length;
    argument.vec = reinterpret_cast<uint64_t>(regions);
    argument.vec_len = std::size(regions);
    argument.category_inverted = kPageIsFile;
    argument.category_mask = kPageIsFile;
    argument.category_anyof_mask = kPageIsPresent | kPageIsSwapped;
    argument.return_mask = kPageIsPresent;
    int found = ioctlRetry(fd, kPagemapScan, &argument);
    if (found < 0) return false;
    for (int i = 0; i < found; i++) {
      add(runs, (regions[i].start - base) / kPageSize, (regions[i].end - regions[i].start) / kPageSize);
    }
    at = argument.walk_end;
  }
  return true;
}

/** The same from the file itself: an entry a page. */
bool read(int fd, const uint8_t* start, size_t length, std::vector<uint32_t>& runs) {
  uint64_t entries[4096];
  size_t first = reinterpret_cast<uint64_t>(start) / kPageSize;
  size_t pages = length / kPageSize;
  for (size_t page = 0; page < pages;) {
    size_t wanted = std::min(pages - page, std::size(entries));
    ssize_t got = pread(fd, entries, wanted * sizeof(uint64_t), static_cast<off_t>((first + page) * sizeof(uint64_t)));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    size_t count = static_cast<size_t>(got) / sizeof(uint64_t);
    for (size_t i = 0; i < count; i++) {
      bool isThere = (entries[i] & (kEntryPresent | kEntrySwapped)) != 0;
      if (isThere && (entries[i] & kEntryFile) == 0) add(runs, page + i, 1);
    }
    page += count;
  }
  return true;
}

}  // namespace

int openPagemap() { return open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC); }

bool privatePages(int pagemap, const uint8_t* start, size_t length, std::vector<uint32_t>& runs) {
  if (scan(pagemap, start, length, runs)) return true;
  if (errno != ENOTTY && errno != EINVAL) return false;
  runs.clear();
  return read(pagemap, start, length, runs);
}
