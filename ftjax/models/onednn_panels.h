// Products of few rows with a kernel that is read once: in panels of columns, as the processor multiplies them, so that
// nothing is copied on the way. oneDNN's own rearranges the kernel for every product, which takes longer than it does.

#pragma once

#include <immintrin.h>

#include <array>
#include <utility>

#include "onednn.h"

namespace ftjax {
namespace {

constexpr int64_t kPanel = 16;    // columns of a panel [inner / 2, kPanel, 2], see quant.panels
constexpr int64_t kTogether = 16; // rows, each of which has a register for its sums
constexpr int64_t kFew = 64;      // rows, up to which panels are multiplied as they are
constexpr int64_t kUnpacked = 64; // panels at a time, where rows are more
constexpr int64_t kAhead = 4096;  // bytes of the kernel that are on their way from memory

// `kRows` rows, of which `pairs` [inner / 2, kRows] has two neighbors in each number, by one panel -> as many rows of
// out, which lie `columns` apart.
template <int kRows>
void ByPanel(const int32_t* pairs, int64_t inner, const char* panel, float* out, int64_t columns) {
  __m512 sums[kRows];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < inner / 2; ++i) {
    const auto weights = (__m512bh)_mm512_loadu_si512(panel + i * kPanel * 4);
    _mm_prefetch(panel + i * kPanel * 4 + kAhead, _MM_HINT_T0);
    for (int row = 0; row < kRows; ++row)
      sums[row] = _mm512_dpbf16_ps(sums[row], (__m512bh)_mm512_set1_epi32(pairs[i * kRows + row]), weights);
  }
  for (int row = 0; row < kRows; ++row) _mm512_storeu_ps(out + row * columns, sums[row]);
}

using PanelProduct = void (*)(const int32_t*, int64_t, const char*, float*, int64_t);

template <int... kCounts>
constexpr std::array<PanelProduct, sizeof...(kCounts)> PanelProducts(std::integer_sequence<int, kCounts...>) {
  return {ByPanel<kCounts + 1>...};
}

// left [rows, inner] by `count` panels -> the first 16 x count of the `columns` of out [rows, columns].
void ByPanels(const char* left, int64_t rows, int64_t inner, const char* panels, int64_t count, float* out,
              int64_t columns) {
  static constexpr auto products = PanelProducts(std::make_integer_sequence<int, kTogether>());
  if (rows <= kFew) {
    Room room(2 * rows * inner + 64);
    auto* pairs = room.Take<int32_t>(rows * inner / 2);
    for (int64_t first = 0; first < rows; first += kTogether) {
      const int64_t together = std::min(kTogether, rows - first);
      for (int64_t row = 0; row < together; ++row)
        for (int64_t i = 0; i < inner / 2; ++i)
          __builtin_memcpy(pairs + first * inner / 2 + i * together + row, left + ((first + row) * inner + 2 * i) * 2, 4);
    }
    for (int64_t panel = 0; panel < count; ++panel)
      for (int64_t row = 0; row < rows; row += kTogether)
        products[std::min(kTogether, rows - row) - 1](pairs + row * inner / 2, inner, panels + panel * inner * kPanel * 2,
                                                      out + row * columns + panel * kPanel, columns);
    return;
  }
  // Many rows pay for the order that oneDNN reads, of some panels at a time: a head may have a thousand times as many.
  Room room(2 * inner * std::min(count, kUnpacked) * kPanel + 64);
  auto* kernel = room.Take<uint16_t>(inner * std::min(count, kUnpacked) * kPanel);
  for (int64_t first = 0; first < count; first += kUnpacked) {
    const int64_t here = std::min(kUnpacked, count - first), its_columns = here * kPanel;
    const auto* from = reinterpret_cast<const uint16_t*>(panels) + first * inner * kPanel;
    for (int64_t panel = 0; panel < here; ++panel)
      for (int64_t i = 0; i < inner; ++i)
        for (int64_t column = 0; column < kPanel; ++column)
          kernel[i * its_columns + panel * kPanel + column] =
              from[(panel * inner + i / 2 * 2) * kPanel + column * 2 + i % 2];
    Multiply({rows, inner, its_columns, Lying(inner), Lying(its_columns), Lying(columns)}, const_cast<char*>(left),
             kernel, out + first * kPanel);
  }
}

}  // namespace
}  // namespace ftjax
