// What the kernel says of a process's pages: /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

constexpr size_t kPageSize = 4096;

/** What privatePages() reads; -1 with errno set where the kernel does not tell. */
int openPagemap();

/**
 * Pages of a copy-on-write mapping that were written, as pairs of first page and number of pages in ascending order.
 * False with errno set where the kernel does not tell.
 */
bool privatePages(int pagemap, const uint8_t* start, size_t length, std::vector<uint32_t>& runs);
