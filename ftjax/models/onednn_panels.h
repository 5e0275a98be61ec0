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
constexpr int64_t kFew = 64;      // rows, up to which panels are multiplied as they are
constexpr int64_t kUnpacked = 64; // panels at a time, where rows are more
constexpr int64_t kAhead = 4096;  // bytes of the kernel that are on their way from memory

// Two neighbors of a row.
struct Pair {
  Number numbers[2];
};

// `kRows` rows, of which `pairs` has [inner / 2, kRows], by one panel of bfloat16 -> as many rows of out, which lie
// `columns` apart; with `added`, to what is there.
#ifdef FTJAX_BFLOAT16
constexpr int64_t kTogether = 16;  // rows, each of which has a register for its sums

template <int kRows>
void ByPanel(const Pair* pairs, int64_t inner, const char* panel, float* out, int64_t columns, bool added) {
  __m512 sums[kRows];
  for (int row = 0; row < kRows; ++row)
    sums[row] = added ? _mm512_loadu_ps(out + row * columns) : _mm512_setzero_ps();
  for (int64_t i = 0; i < inner / 2; ++i) {
    const auto weights = (__m512bh)_mm512_loadu_si512(panel + i * kPanel * 4);
    _mm_prefetch(panel + i * kPanel * 4 + kAhead, _MM_HINT_T0);
    for (int row = 0; row < kRows; ++row) {
      int32_t both;
      __builtin_memcpy(&both, pairs + i * kRows + row, sizeof both);
      sums[row] = _mm512_dpbf16_ps(sums[row], (__m512bh)_mm512_set1_epi32(both), weights);
    }
  }
  for (int row = 0; row < kRows; ++row) _mm512_storeu_ps(out + row * columns, sums[row]);
}
#else
constexpr int64_t kTogether = 6;  // rows, each of which has two registers for its sums

template <int kRows>
void ByPanel(const Pair* pairs, int64_t inner, const char* panel, float* out, int64_t columns, bool added) {
  __m256 left[kRows], right[kRows];  // of columns [0, 8) and [8, 16); arrays of arrays GCC would keep in memory
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    left[row] = added ? _mm256_loadu_ps(out + row * columns) : _mm256_setzero_ps();
    right[row] = added ? _mm256_loadu_ps(out + row * columns + 8) : _mm256_setzero_ps();
  }
  const auto add = [&](const Pair* numbers, int which, __m256 left_weights, __m256 right_weights) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const __m256 number = _mm256_set1_ps(numbers[row].numbers[which]);
      left[row] = _mm256_fmadd_ps(number, left_weights, left[row]);
      right[row] = _mm256_fmadd_ps(number, right_weights, right[row]);
    }
  };
  const __m256i upper = _mm256_set1_epi32(0xffff0000);
  for (int64_t i = 0; i < inner / 2; ++i) {
    const auto* both = reinterpret_cast<const __m256i*>(panel + i * kPanel * 4);
    const __m256i left_bits = _mm256_loadu_si256(both), right_bits = _mm256_loadu_si256(both + 1);
    _mm_prefetch(panel + i * kPanel * 4 + kAhead, _MM_HINT_T0);
    // Of two neighbors one is in the lower half of a number's bits, and one in the upper.
    add(pairs + i * kRows, 0, (__m256)_mm256_slli_epi32(left_bits, 16), (__m256)_mm256_slli_epi32(right_bits, 16));
    add(pairs + i * kRows, 1, (__m256)_mm256_and_si256(left_bits, upper), (__m256)_mm256_and_si256(right_bits, upper));
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    _mm256_storeu_ps(out + row * columns, left[row]);
    _mm256_storeu_ps(out + row * columns + 8, right[row]);
  }
}
#endif

// A number of a panel, to be multiplied.
inline Number Widened(uint16_t bits) {
  if (kSize == sizeof(bits)) return bits;
  const uint32_t all = uint32_t{bits} << 16;
  Number number;
  __builtin_memcpy(&number, &all, kSize);
  return number;
}

using PanelProduct = void (*)(const Pair*, int64_t, const char*, float*, int64_t, bool);

template <int... kCounts>
constexpr std::array<PanelProduct, sizeof...(kCounts)> PanelProducts(std::integer_sequence<int, kCounts...>) {
  return {ByPanel<kCounts + 1>...};
}

// left [rows, inner] by `count` panels -> the first 16 x count of the `columns` of out [rows, columns]; with `added`,
// to what is there.
void ByPanels(const Number* left, int64_t rows, int64_t inner, const char* panels, int64_t count, float* out,
              int64_t columns, bool added) {
  static constexpr auto products = PanelProducts(std::make_integer_sequence<int, kTogether>());
  if (rows <= kFew) {
    Room room(kSize * rows * inner + 64);
    auto* pairs = room.Take<Pair>(rows * inner / 2);
    for (int64_t first = 0; first < rows; first += kTogether) {
      const int64_t together = std::min(kTogether, rows - first);
      for (int64_t row = 0; row < together; ++row)
        for (int64_t i = 0; i < inner / 2; ++i)
          __builtin_memcpy(pairs + first * inner / 2 + i * together + row, left + (first + row) * inner + 2 * i, sizeof(Pair));
    }
    for (int64_t panel = 0; panel < count; ++panel)
      for (int64_t row = 0; row < rows; row += kTogether)
        products[std::min(kTogether, rows - row) - 1](pairs + row * inner / 2, inner, panels + panel * inner * kPanel * 2,
                                                      out + row * columns + panel * kPanel, columns, added);
    return;
  }
  // Many rows pay for the order that oneDNN reads, of some panels at a time: a head may have a thousand times as many.
  Room room(kSize * inner * std::min(count, kUnpacked) * kPanel + 64);
  auto* kernel = room.Take<Number>(inner * std::min(count, kUnpacked) * kPanel);
  for (int64_t first = 0; first < count; first += kUnpacked) {
    const int64_t here = std::min(kUnpacked, count - first), its_columns = here * kPanel;
    const auto* from = reinterpret_cast<const uint16_t*>(panels) + first * inner * kPanel;
    for (int64_t panel = 0; panel < here; ++panel)
      for (int64_t i = 0; i < inner; ++i)
        for (int64_t column = 0; column < kPanel; ++column)
          kernel[i * its_columns + panel * kPanel + column] =
              Widened(from[(panel * inner + i / 2 * 2) * kPanel + column * 2 + i % 2]);
    Multiply({rows, inner, its_columns, Lying(inner), Lying(its_columns), Lying(columns), memory::data_type::f32, added},
             const_cast<Number*>(left), kernel, out + first * kPanel);
  }
}

}  // namespace
}  // namespace ftjax
