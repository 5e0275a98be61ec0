// What XLA calls on CPUs, see onednn.py and onednn_attention.py.

#include "onednn.h"
#include "onednn_attention.h"

namespace ftjax {
namespace {

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
  std::vector<std::function<void()>> pieces;
  for (int64_t from = 0; from < length; from += step) {
    Part part = whole;
    (by_rows ? part.rows : part.columns) = std::min(step, length - from);
    auto at = [](const ffi::AnyBuffer& buffer, int64_t element, int64_t size) {
      return static_cast<char*>(buffer.untyped_data()) + element * size;
    };
    char* its_left = at(left, by_rows ? from * whole.left[0] : 0, 2);
    char* its_right = at(right, by_rows ? 0 : from * whole.right[1], 2);
    char* its_out = at(*out, by_rows ? from * columns : from, wide ? 4 : 2);
    pieces.push_back([=] { Multiply(part, its_left, its_right, its_out); });
  }
  return Share(threads, std::move(pieces));
}

Inputs Of(const Sizes& its, const ffi::AnyBuffer& queries, const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values,
          const ffi::AnyBuffer& first, int64_t row, int64_t head) {
  return {queries.typed_data<float>() + (row * its.length * its.heads + head * its.group) * its.width,
          keys.typed_data<float>() + (row * its.length * its.kv_heads + head) * its.width,
          values.typed_data<float>() + (row * its.length * its.kv_heads + head) * its.value_width,
          first.typed_data<int32_t>() + row * its.length};
}

// Parts of each head group, so that all threads have work.
int64_t Parts(const Sizes& its, const ffi::ThreadPool& threads) {
  const int64_t groups = its.batch * its.kv_heads;
  return std::min<int64_t>(its.blocks, std::max<int64_t>(1, 2 * threads.num_threads() / groups));
}

ffi::Error Attention(ffi::ThreadPool threads, ffi::AnyBuffer queries, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::AnyBuffer first, ffi::Result<ffi::AnyBuffer> out) {
  const Sizes its(queries.dimensions(), values.dimensions());
  const int64_t parts = Parts(its, threads);
  std::vector<std::function<void()>> pieces;
  for (int64_t row = 0; row < its.batch; ++row)
    for (int64_t head = 0; head < its.kv_heads; ++head)
      for (int64_t part = 0; part < parts; ++part) {
        const Inputs given = Of(its, queries, keys, values, first, row, head);
        float* to = out->typed_data<float>() + (row * its.length * its.heads + head * its.group) * its.value_width;
        pieces.push_back([=] { Forward(its, given, part, parts, to); });
      }
  return Share(threads, std::move(pieces));
}

ffi::Error Gradients(ffi::ThreadPool threads, ffi::AnyBuffer queries, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::AnyBuffer first, ffi::AnyBuffer gradient, ffi::Result<ffi::AnyBuffer> d_queries,
                     ffi::Result<ffi::AnyBuffer> d_keys, ffi::Result<ffi::AnyBuffer> d_values) {
  const Sizes its(queries.dimensions(), values.dimensions());
  const int64_t parts = Parts(its, threads), size = its.padded * (its.width + its.value_width);
  // Of each part its own, added in their order: whatever thread is first, the sum is the same.
  std::vector<std::vector<float>> sums(its.batch * its.kv_heads * parts);
  std::vector<std::function<void()>> pieces;
  for (int64_t row = 0; row < its.batch; ++row)
    for (int64_t head = 0; head < its.kv_heads; ++head) {
      auto* its_sums = &sums[(row * its.kv_heads + head) * parts];
      for (int64_t part = 0; part < parts; ++part) {
        const Inputs given = Of(its, queries, keys, values, first, row, head);
        const int64_t at = row * its.length * its.heads + head * its.group;
        const float* left = gradient.typed_data<float>() + at * its.value_width;
        float* to = d_queries->typed_data<float>() + at * its.width;
        pieces.push_back([=, sum = its_sums + part, keys_size = its.padded * its.width] {
          sum->assign(size, 0.0f);
          Backward(its, given, left, part, parts, to, sum->data(), sum->data() + keys_size);
        });
      }
    }
  if (auto error = Share(threads, std::move(pieces)); error.failure()) return error;
  auto add = [&](int64_t row, int64_t head, int64_t width, int64_t from, float* all) {
    for (int64_t part = 0; part < parts; ++part) {
      const float* its_sum = sums[(row * its.kv_heads + head) * parts + part].data() + from;
      for (int64_t t = 0; t < its.length; ++t) {
        float* to = all + ((row * its.length + t) * its.kv_heads + head) * width;
        for (int64_t i = 0; i < width; ++i) to[i] = (part ? to[i] : 0.0f) + its_sum[t * width + i];
      }
    }
  };
  for (int64_t row = 0; row < its.batch; ++row)
    for (int64_t head = 0; head < its.kv_heads; ++head) {
      add(row, head, its.width, 0, d_keys->typed_data<float>());
      add(row, head, its.value_width, its.padded * its.width, d_values->typed_data<float>());
    }
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtjaxAttention, Attention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtjaxAttentionGradients, Gradients,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace ftjax
