// Causal attention of whole rows and its gradients, for onednn.cc: matrix products by oneDNN, of bfloat16 or float32
// values, summed in float32; the softmax in float32. A block of queries at a time, so that its scores stay in the
// cache (Dao et al. 2022), and all heads that share keys in one product. The backward pass makes the scores again.

#pragma once

#include <immintrin.h>

#include <cstring>

#include "onednn.h"

namespace ftjax {
namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16;       // of a vector
#else
constexpr int64_t kLanes = 8;
#endif
constexpr int64_t kKeys = 64;        // what the number of a block's keys is a multiple of: few sizes are compiled
constexpr int64_t kRows = 192;       // of a product, at most: queries of a block times heads that share keys
constexpr int64_t kScores = 1 << 20; // of a block, at most, where rows are long
constexpr float kNone = -1e30f;      // what a score is at least

using Floats = float __attribute__((vector_size(4 * kLanes)));
using Ints = int32_t __attribute__((vector_size(4 * kLanes)));

Floats Load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

void Store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

#ifdef FTJAX_BFLOAT16
// To the nearest bfloat16, ties to even; NaN stays.
void Store(uint16_t* to, Floats x) {
  const __m256bh halves = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &halves, sizeof halves);
}
#endif

// e^x for x <= 0, relatively within 1e-5; NaN stays.
Floats Exp(Floats x) {
  x = x < -87.0f ? Floats{} - 87.0f : x;
  const Floats turned = x * 1.44269504f;
  const Floats whole = (turned + 12582912.0f) - 12582912.0f;  // 1.5 x 2^23: what is added there is rounded
  const Floats rest = turned - whole;
  Floats power = rest * 1.5403530e-4f + 1.3333558e-3f;
  power = power * rest + 9.6181291e-3f;
  power = power * rest + 5.5504109e-2f;
  power = power * rest + 2.4022651e-1f;
  power = power * rest + 6.9314718e-1f;
  power = power * rest + 1.0f;
  return power * reinterpret_cast<Floats>((__builtin_convertvector(whole, Ints) + 127) << 23);
}

float Sum(Floats x) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

float Largest(Floats x) {
  float largest = x[0];
  for (int i = 1; i < kLanes; ++i) largest = std::max(largest, x[i]);
  return largest;
}

// `count` numbers as they are multiplied.
void Round(const float* from, int64_t count, Number* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(to + i, Load(from + i));
  if (i < count) {
    Floats last{};
    std::memcpy(&last, from + i, (count - i) * sizeof(float));
    Number rounded[kLanes];
    Store(rounded, last);
    std::memcpy(to + i, rounded, (count - i) * kSize);
  }
}

// Where `count` of them are rounded to: float32 stays where it is.
Number* RoundedTo(float* numbers, int64_t count, Room& room) {
  return kSize == sizeof(float) ? reinterpret_cast<Number*>(numbers) : room.Take<Number>(count);
}

// Which of a vector's columns, the first of which is `column`, lie in [from, to): all bits set, or none.
Ints Within(int64_t column, int64_t from, int64_t to) {
  Ints places{};
  for (int i = 0; i < kLanes; ++i) places[i] = i;
  places += static_cast<int32_t>(column);
  return (places >= static_cast<int32_t>(from)) & (places < static_cast<int32_t>(to));
}

// scores[0:count], of which columns [from, to) are seen, become e^(score - the largest seen), 0 where not seen.
// Returns their sum. from < to; count is a multiple of kLanes. rounded, if there: the same, to be multiplied.
float Exponents(float* scores, int64_t count, int64_t from, int64_t to, Number* rounded) {
  const int64_t begin = from / kLanes * kLanes;
  Floats most = Floats{} + kNone, sum{};
  for (int64_t i = begin; i < to; i += kLanes) {
    const Floats seen = Within(i, from, to) ? Load(scores + i) : Floats{} + kNone;
    most = seen > most ? seen : most;
  }
  const float largest = Largest(most);
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats its{};
    if (i >= begin && i < to) {
      its = Within(i, from, to) ? Exp(Load(scores + i) - largest) : its;
      sum += its;
    }
    Store(scores + i, its);
    if (rounded) Store(rounded + i, its);
  }
  return Sum(sum);
}

struct Sizes {
  int64_t batch, length, heads, kv_heads, width, value_width;
  int64_t group, block, blocks, padded;  // heads that share keys; queries of a block, their number; keys with padding

  // Of queries [batch, length, heads, width] and values [batch, length, kv_heads, value_width].
  Sizes(ffi::Span<const int64_t> queries, ffi::Span<const int64_t> values)
      : batch(queries[0]), length(queries[1]), heads(queries[2]), kv_heads(values[2]), width(queries[3]),
        value_width(values[3]) {
    group = heads / kv_heads;
    block = 8;
    while (2 * block * group <= kRows && 2 * block * group * length <= kScores) block *= 2;
    blocks = (length + block - 1) / block;
    padded = (blocks * block + kKeys - 1) / kKeys * kKeys;
  }
  int64_t rows() const { return group * block; }
};

// The keys or values [length, width] of one head, to be multiplied, with zeros behind them.
void RoundHead(const Sizes& its, const float* all, int64_t width, Number* to) {
  for (int64_t t = 0; t < its.length; ++t) Round(all + t * its.kv_heads * width, width, to + t * width);
  std::memset(to + its.length * width, 0, (its.padded - its.length) * width * kSize);
}

// What the queries of a block have, of the heads of one group: [group x block, width], zeros behind the end.
void RoundBlock(const Sizes& its, const float* all, int64_t from, int64_t width, Number* to) {
  for (int64_t head = 0; head < its.group; ++head)
    for (int64_t t = from; t < from + its.block; ++t, to += width)
      if (t < its.length)
        Round(all + (t * its.heads + head) * width, width, to);
      else
        std::memset(to, 0, width * kSize);
}

// The keys that a block of queries sees, [begin, end), and those of each: [first[t], t].
struct Span {
  int64_t from, begin, end;
  const int32_t* first;

  Span(const Sizes& its, const int32_t* first, int64_t from) : from(from), first(first) {
    const int64_t last = std::min(from + its.block, its.length);
    begin = *std::min_element(first + from, first + last) / kKeys * kKeys;
    end = (from + its.block + kKeys - 1) / kKeys * kKeys;
  }
  int64_t keys() const { return end - begin; }
};

// Of one row and one group of heads: where its first number lies.
struct Inputs {
  const float *queries, *keys, *values;
  const int32_t* first;  // key that each token sees
};

// Blocks of queries `part`, `part` + `parts`, ... of the heads of one group -> out [length, group of heads, value width].
void Forward(const Sizes& its, const Inputs& given, int64_t part, int64_t parts, float* out) {
  const int64_t rows = its.rows(), width = its.width, value_width = its.value_width, padded = its.padded;
  Room room(kSize * padded * (width + value_width) +
            rows * (kSize * width + (4 + kSize) * padded + 4 * value_width + 4) + 8 * 64);
  auto* keys = room.Take<Number>(padded * width);
  auto* values = room.Take<Number>(padded * value_width);
  auto* queries = room.Take<Number>(rows * width);
  auto* scores = room.Take<float>(rows * padded);
  auto* weights = RoundedTo(scores, rows * padded, room);
  auto* sums = room.Take<float>(rows);
  auto* found = room.Take<float>(rows * value_width);
  RoundHead(its, given.keys, width, keys);
  RoundHead(its, given.values, value_width, values);
  for (int64_t number = part; number < its.blocks; number += parts) {
    const Span span(its, given.first, number * its.block);
    const int64_t count = span.keys();
    RoundBlock(its, given.queries, span.from, width, queries);
    Multiply({rows, width, count, Lying(width), Turned(width), Lying(count)}, queries, keys + span.begin * width, scores);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = std::min(span.from + row % its.block, its.length - 1);
      sums[row] = Exponents(scores + row * count, count, span.first[t] - span.begin, t + 1 - span.begin,
                            weights + row * count);
    }
    Multiply({rows, count, value_width, Lying(count), Lying(value_width), Lying(value_width)}, weights,
             values + span.begin * value_width, found);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = span.from + row % its.block;
      if (t >= its.length) continue;
      float* to = out + (t * its.heads + row / its.block) * value_width;
      for (int64_t i = 0; i < value_width; ++i) to[i] = found[row * value_width + i] / sums[row];
    }
  }
}

// The gradients of those blocks' queries -> d_queries, and what they add to those of keys and values [padded, width].
void Backward(const Sizes& its, const Inputs& given, const float* gradient, int64_t part, int64_t parts,
              float* d_queries, float* d_keys, float* d_values) {
  const int64_t rows = its.rows(), width = its.width, value_width = its.value_width, padded = its.padded;
  Room room(kSize * padded * (width + value_width) +
            rows * ((4 + kSize) * width + kSize * value_width + 2 * (4 + kSize) * padded) + 9 * 64);
  auto* keys = room.Take<Number>(padded * width);
  auto* values = room.Take<Number>(padded * value_width);
  auto* queries = room.Take<Number>(rows * width);
  auto* left = room.Take<Number>(rows * value_width);
  auto* scores = room.Take<float>(rows * padded);
  auto* d_weights = room.Take<float>(rows * padded);
  auto* weights = RoundedTo(scores, rows * padded, room);
  auto* d_scores = RoundedTo(d_weights, rows * padded, room);
  auto* found = room.Take<float>(rows * width);
  RoundHead(its, given.keys, width, keys);
  RoundHead(its, given.values, value_width, values);
  for (int64_t number = part; number < its.blocks; number += parts) {
    const Span span(its, given.first, number * its.block);
    const int64_t count = span.keys();
    auto* its_keys = keys + span.begin * width;
    auto* its_values = values + span.begin * value_width;
    RoundBlock(its, given.queries, span.from, width, queries);
    RoundBlock(its, gradient, span.from, value_width, left);
    Multiply({rows, width, count, Lying(width), Turned(width), Lying(count)}, queries, its_keys, scores);
    Multiply({rows, value_width, count, Lying(value_width), Turned(value_width), Lying(count)}, left, its_values,
             d_weights);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = std::min(span.from + row % its.block, its.length - 1);
      const int64_t from = span.first[t] - span.begin, to = t + 1 - span.begin;
      float *its_scores = scores + row * count, *its_d = d_weights + row * count;
      const float shared = 1 / Exponents(its_scores, count, from, to, nullptr);
      const int64_t begin = from / kLanes * kLanes;
      Floats sum{};
      for (int64_t i = begin; i < to; i += kLanes) sum += Load(its_scores + i) * Load(its_d + i);
      const float mean = Sum(sum) * shared;  // of the gradients of the weights, by the weights
      for (int64_t i = 0; i < count; i += kLanes) {
        const bool any = i >= begin && i < to;
        const Floats its_weights = any ? Load(its_scores + i) * shared : Floats{};
        Store(weights + row * count + i, its_weights);
        Store(d_scores + row * count + i, any ? its_weights * (Load(its_d + i) - mean) : Floats{});
      }
    }
    Multiply({rows, count, width, Lying(count), Lying(width), Lying(width)}, d_scores, its_keys, found);
    Multiply({count, rows, width, Turned(count), Lying(width), Lying(width), memory::data_type::f32, true}, d_scores,
             queries, d_keys + span.begin * width);
    Multiply({count, rows, value_width, Turned(count), Lying(value_width), Lying(value_width),
              memory::data_type::f32, true},
             weights, left, d_values + span.begin * value_width);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = span.from + row % its.block;
      if (t < its.length)
        std::memcpy(d_queries + (t * its.heads + row / its.block) * width, found + row * width, width * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace ftjax
