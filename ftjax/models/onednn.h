// What onednn.cc and the headers beside it share: one thread's matrix product, by oneDNN, of bfloat16 or float32 values,
// summed in float32; and XLA's threads at work on one thing.
//
// oneDNN's own threads would be a second pool, which waits for work by spinning on the cores that XLA's next operation
// needs. So each of XLA's threads multiplies a part of the result by itself.

#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "oneapi/dnnl/dnnl.hpp"
#include "xla/ffi/api/ffi.h"

namespace ftjax {

namespace ffi = xla::ffi;
using dnnl::memory;

// Of what is multiplied: bfloat16, as its bits, on CPUs with instructions for it, and float32 on others (onednn.py).
#ifdef FTJAX_BFLOAT16
using Number = uint16_t;
constexpr auto kType = memory::data_type::bf16;
#else
using Number = float;
constexpr auto kType = memory::data_type::f32;
#endif
constexpr int64_t kSize = sizeof(Number);

inline const dnnl::engine& Cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// A part of a product: rows and columns of the result, and where the elements of a row and of a column lie.
struct Part {
  int64_t rows, inner, columns;
  memory::dims left, right, out;  // strides, in elements
  memory::data_type type = memory::data_type::f32;  // of the result
  bool added = false;  // to what is there

  auto Key() const { return std::tie(rows, inner, columns, left, right, out, type, added); }
  bool operator<(const Part& other) const { return Key() < other.Key(); }
};

// Strides of a matrix whose rows have `row` elements, and of one that is stored turned, with so many in its columns.
inline memory::dims Lying(int64_t row) { return {row, 1}; }
inline memory::dims Turned(int64_t row) { return {1, row}; }

struct Compiled {
  memory::desc left, right, out, scratch;
  dnnl::matmul product;

  explicit Compiled(const Part& part)
      : left({part.rows, part.inner}, kType, part.left),
        right({part.inner, part.columns}, kType, part.right),
        out({part.rows, part.columns}, part.type, part.out) {
    dnnl::primitive_attr attributes;
    // The library's own scratch memory must not be used by two threads at once.
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (part.added) {
      dnnl::post_ops after;
      after.append_sum();
      attributes.set_post_ops(after);
    }
    dnnl::matmul::primitive_desc described(Cpu(), left, right, out, attributes);
    scratch = described.scratchpad_desc();
    product = dnnl::matmul(described);
  }
};

// One thread for this thread's own regions. What it had comes back: the caller's may be that of torch in Python, too.
struct Alone {
  const int before = omp_get_max_threads();
  Alone() { omp_set_num_threads(1); }
  ~Alone() { omp_set_num_threads(before); }
};

// A thread's own memory, which it keeps.
class Room {
 public:
  explicit Room(size_t bytes) {
    thread_local std::vector<char> kept;
    if (kept.size() < bytes + 64) kept.resize(bytes + 64);
    next_ = reinterpret_cast<uintptr_t>(kept.data());
  }
  template <typename T>
  T* Take(int64_t count) {
    T* taken = reinterpret_cast<T*>((next_ + 63) & ~uintptr_t{63});
    next_ = reinterpret_cast<uintptr_t>(taken + count);
    return taken;
  }

 private:
  uintptr_t next_;
};

inline void Multiply(const Part& part, void* left, void* right, void* out) {
  const Alone alone;
  thread_local std::map<Part, Compiled> compiled;
  thread_local std::vector<char> scratch;
  thread_local dnnl::stream stream(Cpu());
  if (compiled.size() >= 1024) compiled.clear();  // of rows of ever new lengths
  auto found = compiled.find(part);
  if (found == compiled.end()) found = compiled.emplace(part, Compiled(part)).first;
  const Compiled& its = found->second;
  const size_t needed = its.scratch.get_size() + 64;
  if (scratch.size() < needed) scratch.resize(needed);
  void* aligned = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(scratch.data()) + 63) & ~uintptr_t{63});
  its.product.execute(stream, {{DNNL_ARG_SRC, memory(its.left, Cpu(), left)},
                               {DNNL_ARG_WEIGHTS, memory(its.right, Cpu(), right)},
                               {DNNL_ARG_DST, memory(its.out, Cpu(), out)},
                               {DNNL_ARG_SCRATCHPAD, memory(its.scratch, Cpu(), aligned)}});
}

// What the threads that work on one product share. Whoever comes takes the next piece; a thread that comes when all are
// taken finds nothing to do, so that the caller never waits for a thread that has not begun.
struct Work {
  std::vector<std::function<void()>> pieces;
  std::atomic<size_t> next{0}, done{0};
  std::atomic<bool> failed{false};
  std::string error;

  void Run() {
    for (size_t i; (i = next.fetch_add(1)) < pieces.size(); done.fetch_add(1, std::memory_order_release)) {
      try {
        pieces[i]();
      } catch (const std::exception& caught) {
        if (!failed.exchange(true)) error = caught.what();
      }
    }
  }
};

// All pieces are done when it returns, by `threads` and the caller.
inline ffi::Error Share(ffi::ThreadPool& threads, std::vector<std::function<void()>> pieces) {
  auto work = std::make_shared<Work>();
  work->pieces = std::move(pieces);
  for (size_t i = 1; i < work->pieces.size(); ++i) threads.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load(std::memory_order_acquire) < work->pieces.size()) std::this_thread::yield();
  return work->failed ? ffi::Error::Internal("oneDNN: " + work->error) : ffi::Error::Success();
}

}  // namespace ftjax
