// The matrix product that models/onednn.py compiles and calls on CPUs: oneDNN's, of bfloat16 values, summed in float32.
//
// XLA's threads share the work: oneDNN's own would be a second pool, whose threads wait for work by spinning on the cores
// that XLA's next operation needs. Each thread multiplies a part of the result by itself.

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

namespace ffi = xla::ffi;
using dnnl::memory;

namespace {

const dnnl::engine& Cpu() {
  static const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

// A part of a product: rows and columns of the result, and where the elements of a row and of a column lie.
struct Part {
  int64_t rows, inner, columns;
  memory::dims left, right, out;  // strides, in elements
  memory::data_type type;         // of the result

  auto Key() const { return std::tie(rows, inner, columns, left, right, out, type); }
  bool operator<(const Part& other) const { return Key() < other.Key(); }
};

struct Compiled {
  memory::desc left, right, out, scratch;
  dnnl::matmul product;

  explicit Compiled(const Part& part)
      : left({part.rows, part.inner}, memory::data_type::bf16, part.left),
        right({part.inner, part.columns}, memory::data_type::bf16, part.right),
        out({part.rows, part.columns}, part.type, part.out) {
    dnnl::primitive_attr attributes;
    // The library's own scratch memory must not be used by two threads at once.
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
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

void Multiply(const Part& part, void* left, void* right, void* out) {
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

ffi::Error Product(ffi::ThreadPool threads, ffi::AnyBuffer left, ffi::AnyBuffer right, ffi::Result<ffi::AnyBuffer> out,
                   bool left_turned, bool right_turned) {
  const auto l = left.dimensions(), r = right.dimensions();
  const int64_t rows = l[left_turned], inner = l[!left_turned], columns = r[!right_turned];
  const bool wide = out->element_type() == ffi::DataType::F32;
  const Part whole{rows,
                   inner,
                   columns,
                   left_turned ? memory::dims{1, rows} : memory::dims{inner, 1},
                   right_turned ? memory::dims{1, inner} : memory::dims{columns, 1},
                   {columns, 1},
                   wide ? memory::data_type::f32 : memory::data_type::bf16};
  // Cut along the longer side of the result, at multiples of 32, which the registers hold.
  const bool by_rows = rows >= columns;
  const int64_t length = by_rows ? rows : columns;
  const int64_t count = rows * inner * columns < (1 << 18) ? 1 : std::max<int64_t>(1, threads.num_threads());
  const int64_t step = (((length + count - 1) / count + 31) / 32) * 32;
  auto work = std::make_shared<Work>();
  for (int64_t from = 0; from < length; from += step) {
    Part part = whole;
    (by_rows ? part.rows : part.columns) = std::min(step, length - from);
    auto at = [](const ffi::AnyBuffer& buffer, int64_t element, int64_t size) {
      return static_cast<char*>(buffer.untyped_data()) + element * size;
    };
    char* its_left = at(left, by_rows ? from * whole.left[0] : 0, 2);
    char* its_right = at(right, by_rows ? 0 : from * whole.right[1], 2);
    char* its_out = at(*out, by_rows ? from * columns : from, wide ? 4 : 2);
    work->pieces.push_back([=] { Multiply(part, its_left, its_right, its_out); });
  }
  for (size_t i = 1; i < work->pieces.size(); ++i) threads.Schedule([work] { work->Run(); });
  work->Run();
  while (work->done.load(std::memory_order_acquire) < work->pieces.size()) std::this_thread::yield();
  if (work->failed) return ffi::Error::Internal("oneDNN: " + work->error);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtjaxProduct, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("left_turned")
                                  .Attr<bool>("right_turned"));
