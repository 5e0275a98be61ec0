// Causal attention of whole rows and its gradients, for onednn.cc: matrix products by oneDNN, of bfloat16 or float32
// values, summed in float32; the softmax in float32. A block of queries at a time, so that its scores stay in the
// cache (Dao et al. 2022), and all heads that share keys in one product. The backward pass makes the scores again.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <vector>

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

// The columns [from, to) of a row of scores; called, which of the vector that begins with `column`: all bits, or none.
struct Columns {
  int64_t from, to;

  Ints operator()(int64_t column) const {
    Ints places{};
    for (int i = 0; i < kLanes; ++i) places[i] = i;
    places += static_cast<int32_t>(column);
    return (places >= static_cast<int32_t>(from)) & (places < static_cast<int32_t>(to));
  }
};

// What a query sees of the columns of a block: of those the ones whose `until` is above `token`, its own place.
struct Sight : Columns {
  const int32_t* until;
  int32_t token;

  Ints operator()(int64_t column) const {
    Ints its;
    std::memcpy(&its, until + column, sizeof its);
    return Columns::operator()(column) & (its > token);
  }
};

// scores[0:count] become e^(score - the largest that is seen), 0 where not seen. Returns their sum. Some are seen;
// count is a multiple of kLanes. rounded, if there: the same, to be multiplied.
template <typename Sees>
float Exponents(float* scores, int64_t count, const Sees& sees, Number* rounded) {
  const int64_t begin = sees.from / kLanes * kLanes;
  Floats most = Floats{} + kNone, sum{};
  for (int64_t i = begin; i < sees.to; i += kLanes) {
    const Floats seen = sees(i) ? Load(scores + i) : Floats{} + kNone;
    most = seen > most ? seen : most;
  }
  const float largest = Largest(most);
  for (int64_t i = 0; i < count; i += kLanes) {
    Floats its{};
    if (i >= begin && i < sees.to) {
      its = sees(i) ? Exp(Load(scores + i) - largest) : its;
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

// Of one row and one group of heads: where its first number lies.
struct Inputs {
  const float *queries, *keys, *values;
  const int32_t *first, *until;  // the first key that each token sees; the first token after each that does not see it
};

// The keys that a block of queries sees something of, kKeys at a time: in parts that lie one after the other, which are
// the columns of its scores. Where no documents begin alike there is one part.
struct Seen {
  struct Run {
    int64_t begin, end, column;  // keys [begin, end), the first of which is that column
  };
  int64_t from, last, columns = 0;
  std::vector<Run> parts;
  const Inputs& given;
  int32_t* until;  // of the key of each column, 0 behind the row's end

  Seen(const Sizes& its, const Inputs& given, int64_t from, int32_t* room)
      : from(from), last(std::min(from + its.block, its.length)), given(given), until(room) {
    const int64_t end = (from + its.block + kKeys - 1) / kKeys * kKeys;
    const int64_t begin = *std::min_element(given.first + from, given.first + last) / kKeys * kKeys;
    for (int64_t key = begin; key < end; key += kKeys) {
      const int64_t here = std::max<int64_t>(0, std::min(kKeys, its.length - key));
      if (key + kKeys <= from && *std::max_element(given.until + key, given.until + key + here) <= from) continue;
      std::copy_n(given.until + key, here, until + columns);
      std::fill_n(until + columns + here, kKeys - here, 0);
      if (parts.empty() || parts.back().end < key) parts.push_back({key, key, columns});
      parts.back().end += kKeys;
      columns += kKeys;
    }
  }

  // Of the query of this row of the block's scores; behind the row's end of its last one.
  Sight of(int64_t row) const {
    const int64_t token = std::min(from + row, last - 1), first = given.first[token];
    const auto part = std::find_if(parts.begin(), parts.end(), [=](const Run& one) { return first < one.end; });
    const Run& own = parts.back();  // where the query's own key lies
    return {{part->column + first - part->begin, own.column + token + 1 - own.begin},
            until,
            static_cast<int32_t>(token)};
  }
};

// Blocks of queries `part`, `part` + `parts`, ... of one group of heads -> out [length, group of heads, value width].
void Forward(const Sizes& its, const Inputs& given, int64_t part, int64_t parts, float* out) {
  const int64_t rows = its.rows(), width = its.width, value_width = its.value_width, padded = its.padded;
  Room room((kSize * (width + value_width) + 4) * padded +
            rows * (kSize * width + (4 + kSize) * padded + 4 * value_width + 4) + 9 * 64);
  auto* keys = room.Take<Number>(padded * width);
  auto* values = room.Take<Number>(padded * value_width);
  auto* until = room.Take<int32_t>(padded);
  auto* queries = room.Take<Number>(rows * width);
  auto* scores = room.Take<float>(rows * padded);
  auto* weights = RoundedTo(scores, rows * padded, room);
  auto* sums = room.Take<float>(rows);
  auto* found = room.Take<float>(rows * value_width);
  RoundHead(its, given.keys, width, keys);
  RoundHead(its, given.values, value_width, values);
  for (int64_t number = part; number < its.blocks; number += parts) {
    const Seen seen(its, given, number * its.block, until);
    const int64_t count = seen.columns;
    RoundBlock(its, given.queries, seen.from, width, queries);
    for (const auto& [begin, end, column] : seen.parts)
      Multiply({rows, width, end - begin, Lying(width), Turned(width), Lying(count)}, queries, keys + begin * width,
               scores + column);
    for (int64_t row = 0; row < rows; ++row)
      sums[row] = Exponents(scores + row * count, count, seen.of(row % its.block), weights + row * count);
    for (const auto& [begin, end, column] : seen.parts)
      Multiply({rows, end - begin, value_width, Lying(count), Lying(value_width), Lying(value_width),
                memory::data_type::f32, column > 0},
               weights + column, values + begin * value_width, found);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = seen.from + row % its.block;
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
  Room room((kSize * (width + value_width) + 4) * padded +
            rows * ((4 + kSize) * width + kSize * value_width + 2 * (4 + kSize) * padded) + 10 * 64);
  auto* keys = room.Take<Number>(padded * width);
  auto* values = room.Take<Number>(padded * value_width);
  auto* until = room.Take<int32_t>(padded);
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
    const Seen seen(its, given, number * its.block, until);
    const int64_t count = seen.columns;
    RoundBlock(its, given.queries, seen.from, width, queries);
    RoundBlock(its, gradient, seen.from, value_width, left);
    for (const auto& [begin, end, column] : seen.parts) {
      Multiply({rows, width, end - begin, Lying(width), Turned(width), Lying(count)}, queries, keys + begin * width,
               scores + column);
      Multiply({rows, value_width, end - begin, Lying(value_width), Turned(value_width), Lying(count)}, left,
               values + begin * value_width, d_weights + column);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const Sight sees = seen.of(row % its.block);
      float *its_scores = scores + row * count, *its_d = d_weights + row * count;
      const float shared = 1 / Exponents(its_scores, count, sees, nullptr);
      const int64_t begin = sees.from / kLanes * kLanes;
      Floats sum{};
      for (int64_t i = begin; i < sees.to; i += kLanes) sum += Load(its_scores + i) * Load(its_d + i);
      const float mean = Sum(sum) * shared;  // of the gradients of the weights, by the weights
      for (int64_t i = 0; i < count; i += kLanes) {
        const bool any = i >= begin && i < sees.to;
        const Floats its_weights = any ? Load(its_scores + i) * shared : Floats{};
        Store(weights + row * count + i, its_weights);
        Store(d_scores + row * count + i, any ? its_weights * (Load(its_d + i) - mean) : Floats{});
      }
    }
    for (const auto& [begin, end, column] : seen.parts) {
      Multiply({rows, end - begin, width, Lying(count), Lying(width), Lying(width), memory::data_type::f32, column > 0},
               d_scores + column, keys + begin * width, found);
      Multiply({end - begin, rows, width, Turned(count), Lying(width), Lying(width), memory::data_type::f32, true},
               d_scores + column, queries, d_keys + begin * width);
      Multiply({end - begin, rows, value_width, Turned(count), Lying(value_width), Lying(value_width),
                memory::data_type::f32, true},
               weights + column, left, d_values + begin * value_width);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t t = seen.from + row % its.block;
      if (t < its.length)
        std::memcpy(d_queries + (t * its.heads + row / its.block) * width, found + row * width, width * sizeof(float));
    }
  }
}

}  // namespace
}  // namespace ftjax
