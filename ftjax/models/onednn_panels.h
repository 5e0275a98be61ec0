// Products with a kernel that is read once: in panels of columns, as the processor multiplies them, so that nothing is
// copied on the way, and by none of oneDNN, which rearranges the kernel for every product. Rows of zeros are what fills
// a batch up, or what has ended in it: they cost nothing.

#pragma once

#include <immintrin.h>

#include <array>
#include <utility>

#include "onednn_attention.h"

namespace ftjax {
namespace {

constexpr int64_t kPanel = 16;     // columns of a panel [inner / 2, kPanel, 2], see quant.panels
constexpr int64_t kInner = 2048;   // of a panel, at a time: it and the rows that it multiplies stay in the cache
constexpr int64_t kBlock = 48;     // rows at a time; of no more than these threads share the panels, and else the rows
constexpr int64_t kAhead = 4096;   // bytes of the kernel that are on their way from memory

// Two neighbors of a row.
struct Pair {
  Number numbers[2];
};

// The sums of `kRows` rows, of which `pairs` has [inner / 2, kRows], by one panel of bfloat16 -> 16 numbers at each of
// outs; with `added`, to what is there.
#ifdef FTJAX_BFLOAT16
constexpr int64_t kTogether = 16;  // rows, each of which has a register for its sums

template <int kRows>
void ByPanel(const Pair* pairs, int64_t inner, const char* panel, float* const* outs, bool added) {
  __m512 sums[kRows];
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) sums[row] = added ? _mm512_loadu_ps(outs[row]) : _mm512_setzero_ps();
  for (int64_t i = 0; i < inner / 2; ++i) {
    const auto weights = (__m512bh)_mm512_loadu_si512(panel + i * kPanel * 4);
    _mm_prefetch(panel + i * kPanel * 4 + kAhead, _MM_HINT_T0);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
      int32_t both;
      __builtin_memcpy(&both, pairs + i * kRows + row, sizeof both);
      sums[row] = _mm512_dpbf16_ps(sums[row], (__m512bh)_mm512_set1_epi32(both), weights);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < kRows; ++row) _mm512_storeu_ps(outs[row], sums[row]);
}
#else
constexpr int64_t kTogether = 6;  // rows, each of which has two registers for its sums

template <int kRows>
void ByPanel(const Pair* pairs, int64_t inner, const char* panel, float* const* outs, bool added) {
  __m256 left[kRows], right[kRows];  // of columns [0, 8) and [8, 16); arrays of arrays GCC would keep in memory
#pragma GCC unroll 8
  for (int row = 0; row < kRows; ++row) {
    left[row] = added ? _mm256_loadu_ps(outs[row]) : _mm256_setzero_ps();
    right[row] = added ? _mm256_loadu_ps(outs[row] + 8) : _mm256_setzero_ps();
  }
  const auto add = [&](const Pair* numbers, int which, __m256 left_weights, __m256 right_weights) {
#pragma GCC unroll 8
    for (int row = 0; row < kRows; ++row) {
      const __m256 number = _mm256_set1_ps(numbers[row].numbers[which]);
      left[row] = _mm256_fmadd_ps(number, left_weights, left[row]);
      right[row] = _mm256_fmadd_ps(number, right_weights, right[row]);
      // Says that the sums are in registers here: GCC would move four of them to memory and back, two thirds as fast.
      asm("" : "+x"(left[row]), "+x"(right[row]));
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
    _mm256_storeu_ps(outs[row], left[row]);
    _mm256_storeu_ps(outs[row] + 8, right[row]);
  }
}
#endif

using PanelProduct = void (*)(const Pair*, int64_t, const char*, float* const*, bool);

template <int... kCounts>
constexpr std::array<PanelProduct, sizeof...(kCounts)> PanelProducts(std::integer_sequence<int, kCounts...>) {
  return {ByPanel<kCounts + 1>...};
}

// `count` rows in groups that are multiplied together, as large as each other: where each begins, and the last ends.
struct Groups {
  int64_t rows, count = (rows + kTogether - 1) / kTogether;

  int64_t operator()(int64_t group) const { return rows * group / count; }
};

// A part of a matrix [., columns]: the rows of these numbers.
template <typename T>
struct Rows {
  T* first;
  int64_t columns;
  const int64_t* numbers;

  T* operator[](int64_t row) const { return first + numbers[row] * columns; }
};

// `count` rows -> pairs: of each kInner of their columns, the last of which may be fewer, those of each group of rows,
// [columns / 2, rows of the group].
void Pack(const Rows<const Number>& rows, int64_t count, Pair* pairs) {
  const Groups groups{count};
  for (int64_t from = 0; from < rows.columns; from += kInner)
    for (int64_t group = 0; group < groups.count; ++group)
      for (int64_t i = from; i < std::min(from + kInner, rows.columns); i += 2)
        for (int64_t row = groups(group); row < groups(group + 1); ++row)
          __builtin_memcpy(pairs++, rows[row] + i, sizeof(Pair));
}

// `count` rows that are packed, by so many panels [inner / 2, kPanel, 2] -> out, from its first columns on; with `added`,
// to what is there.
void ByPanels(const Pair* pairs, int64_t count, int64_t inner, const char* panel, int64_t panels,
              const Rows<float>& out, bool added) {
  static constexpr auto products = PanelProducts(std::make_integer_sequence<int, kTogether>());
  const Groups groups{count};
  for (int64_t from = 0; from < inner; from += kInner, added = true) {
    const int64_t here = std::min(kInner, inner - from);
    for (int64_t number = 0; number < panels; ++number)
      for (int64_t group = 0; group < groups.count; ++group) {
        const int64_t first = groups(group), rows = groups(group + 1) - first;
        float* outs[kTogether];
        for (int64_t row = 0; row < rows; ++row) outs[row] = out[first + row] + number * kPanel;
        products[rows - 1](pairs + (from * count + first * here) / 2, here, panel + (number * inner + from) * kPanel * 2,
                           outs, added);
      }
  }
}

// The kernels of all layers [layers, columns / kPanel, inner / 2, kPanel, 2], in panels, and where that of one begins.
struct Layer {
  int64_t inner, panels;
  const char* first;

  Layer(const ffi::AnyBuffer& all, int64_t index)
      : inner(2 * all.dimensions()[2]), panels(all.dimensions()[1]),
        first(static_cast<const char*>(all.untyped_data()) + index * panels * size()) {}
  int64_t size() const { return 2 * inner * kPanel; }  // of a panel, in bytes
};

// A kernel, and of a rank that may be 0 its adapter.
struct Adapted {
  Layer kernel, a, b;
};

// The rows of these numbers, `count` of them, by the panels [from, to) of a kernel and its adapter -> the same of out.
// Threads that share the panels make x A each for itself, rather than wait for each other.
void ByAdapted(const Number* left, const int64_t* numbers, int64_t count, const Adapted& by, int64_t from, int64_t to,
               float* out) {
  static const auto in_order = [] {
    std::array<int64_t, kBlock> places;
    for (int64_t i = 0; i < kBlock; ++i) places[i] = i;
    return places;
  }();
  const int64_t inner = by.kernel.inner, rank = by.b.inner, columns = by.kernel.panels * kPanel;
  Room room(kBlock * ((inner + 2 * rank) * kSize + rank * sizeof(float)) + 4 * 64);
  auto* pairs = room.Take<Pair>(kBlock * inner / 2);
  auto* low = room.Take<float>(kBlock * rank);
  auto* rounded = room.Take<Number>(kBlock * rank);
  auto* low_pairs = room.Take<Pair>(kBlock * rank / 2);
  for (; count > 0; count -= kBlock, numbers += kBlock) {
    const int64_t rows = std::min(kBlock, count);
    const Rows<float> result{out + from * kPanel, columns, numbers};
    Pack({left, inner, numbers}, rows, pairs);
    ByPanels(pairs, rows, inner, by.kernel.first + from * by.kernel.size(), to - from, result, false);
    if (!rank) continue;
    ByPanels(pairs, rows, inner, by.a.first, by.a.panels, {low, rank, in_order.data()}, false);
    Round(low, rows * rank, rounded);
    Pack({rounded, rank, in_order.data()}, rows, low_pairs);
    ByPanels(low_pairs, rows, rank, by.b.first + from * by.b.size(), to - from, result, true);
  }
}

// The numbers of the rows of left [rows, inner] that are not of zeros; out [rows, columns] of the others is 0.
std::vector<int64_t> NotZero(const Number* left, int64_t rows, int64_t inner, float* out, int64_t columns) {
  std::vector<int64_t> numbers;
  for (int64_t row = 0; row < rows; ++row) {
    const Number* its = left + row * inner;
    // Doubled, the bits of a bfloat16 lose their sign, and -0 is 0 too.
    if (std::any_of(its, its + inner, [](Number number) { return static_cast<Number>(2 * number) != 0; }))
      numbers.push_back(row);
    else
      std::fill_n(out + row * columns, columns, 0.0f);
  }
  return numbers;
}

}  // namespace
}  // namespace ftjax
