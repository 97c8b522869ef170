// The elements of many tensors as columns, one tensor after another, and even shares of them for threads.
#pragma once
#include <algorithm>
#include <cstdint>

namespace mtlgrad::cpu {

// Columns at a time in gram: 8 rows of float64 are 16 KiB, half an L1 cache. Shares are whole panels.
constexpr int64_t kPanel = 256;

// The columns are cut into `slots` contiguous shares: as many as keep threads busy, depending on sizes alone (with `sums`
// numbers kept for each), so that sums have the same order whatever the number of threads.
struct Shares {
  static constexpr int64_t kMostSums =
      1 << 22;  // float64 of workspace: 32 MiB, which only hundreds of tasks would pass
  int64_t columns, slots, size;
  Shares(int64_t total, int64_t sums) : columns(total) {
    slots = std::clamp<int64_t>(total / 32768, 1, 256);
    slots = std::min(slots, std::max<int64_t>(kMostSums / sums, 1));
    size = (total + slots - 1) / slots;
    size = std::max((size + kPanel - 1) / kPanel, int64_t{1}) * kPanel;
  }
};

inline int64_t columns_of(const int64_t* sizes, int64_t tensors) {
  int64_t total = 0;
  for (int64_t p = 0; p < tensors; ++p) total += sizes[p];
  return total;
}

// Calls visit(tensor, first element, count, column) for the pieces of [begin, end) of the columns, at most `most` long.
template <typename Visit>
void for_pieces(const int64_t* sizes, int64_t tensors, int64_t begin, int64_t end, int64_t most, const Visit& visit) {
  int64_t p = 0, start = 0;
  while (p < tensors && start + sizes[p] <= begin) start += sizes[p++];
  for (int64_t column = begin; column < end;) {
    while (start + sizes[p] <= column) start += sizes[p++];
    const int64_t count = std::min({end - column, start + sizes[p] - column, most - (column - begin) % most});
    visit(p, column - start, count, column);
    column += count;
  }
}

}  // namespace mtlgrad::cpu
