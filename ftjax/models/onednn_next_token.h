// Attention of the next token of each row to those before it, which lie in a cache, for onednn.cc: in float32, and by
// nothing of oneDNN, since each key is multiplied once. Of the cache only what a token sees is read, where it lies.

#pragma once

#include "onednn_attention.h"

namespace ftjax {
namespace {

float Dot(const float* left, const float* right, int64_t count) {
  Floats sums{};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) sums += Load(left + i) * Load(right + i);
  float sum = Sum(sums);
  for (; i < count; ++i) sum += left[i] * right[i];
  return sum;
}

// to[0:count] += factor * from[0:count]
void Add(float factor, const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) Store(to + i, Load(to + i) + factor * Load(from + i));
  for (; i < count; ++i) to[i] += factor * from[i];
}

// Of the token's own and of those in the cache, of one row and one head of keys: where its first number lies.
struct Lines {
  const float *own, *cached;
  int64_t width;

  // That of token number `token` of `count` in the cache, or of the token itself, which comes after them.
  const float* Of(int64_t token, int64_t count) const { return token < count ? cached + token * width : own; }
};

// The queries [group, width] of the heads that share keys, which see the `count` tokens of the cache and their own ->
// out [group, value width].
void NextToken(const float* queries, int64_t group, const Lines& keys, const Lines& values, int64_t count, float* out) {
  const int64_t padded = (count + kLanes) / kLanes * kLanes;  // of count + 1
  Room room(group * padded * sizeof(float) + 64);
  auto* weights = room.Take<float>(group * padded);
  for (int64_t token = 0; token <= count; ++token)
    for (int64_t head = 0; head < group; ++head)
      weights[head * padded + token] = Dot(queries + head * keys.width, keys.Of(token, count), keys.width);
  for (int64_t head = 0; head < group; ++head) {
    float* its = weights + head * padded;
    const float shared = 1 / Exponents(its, padded, Columns{0, count + 1}, nullptr);
    for (int64_t token = 0; token <= count; ++token) its[token] *= shared;
  }
  std::fill(out, out + group * values.width, 0.0f);
  for (int64_t token = 0; token <= count; ++token)
    for (int64_t head = 0; head < group; ++head)
      Add(weights[head * padded + token], values.Of(token, count), values.width, out + head * values.width);
}

}  // namespace
}  // namespace ftjax
