// What XLA calls on CPUs, see onednn.py and onednn_attention.py.

#include "onednn.h"
#include "onednn_attention.h"
#include "onednn_next_token.h"
#include "onednn_panels.h"

namespace ftjax {
namespace {

// Of a product: the operands, and how they and the result lie.
struct Operands {
  Part part;
  char *left, *right;

  Operands(const ffi::AnyBuffer& left_buffer, const ffi::AnyBuffer& right_buffer, const ffi::AnyBuffer& out,
           bool left_turned, bool right_turned, bool added)
      : left(static_cast<char*>(left_buffer.untyped_data())), right(static_cast<char*>(right_buffer.untyped_data())) {
    const auto l = left_buffer.dimensions(), r = right_buffer.dimensions();
    part.rows = l[left_turned], part.inner = l[!left_turned], part.columns = r[!right_turned];
    part.left = left_turned ? Turned(part.rows) : Lying(part.inner);
    part.right = right_turned ? Turned(part.inner) : Lying(part.columns);
    part.out = Lying(part.columns);
    if (out.element_type() != ffi::DataType::F32) part.type = memory::data_type::bf16;
    part.added = added;
  }
};

// The sum of `products` -> out. Each thread adds to its part of the result while that is in its cache.
ffi::Error Multiplied(ffi::ThreadPool& threads, const std::vector<Operands>& products, const ffi::AnyBuffer& out) {
  const Part& whole = products[0].part;
  // Cut along the longer side of the result, at multiples of 32, which the registers hold.
  const bool by_rows = whole.rows >= whole.columns;
  const int64_t length = by_rows ? whole.rows : whole.columns;
  const bool small = whole.rows * whole.inner * whole.columns < (1 << 18);
  const int64_t count = small ? 1 : std::max<int64_t>(1, threads.num_threads());
  const int64_t step = (((length + count - 1) / count + 31) / 32) * 32;
  const int64_t size = whole.type == memory::data_type::f32 ? 4 : 2;
  std::vector<std::function<void()>> pieces;
  for (int64_t from = 0; from < length; from += step) {
    char* to = static_cast<char*>(out.untyped_data()) + size * from * (by_rows ? whole.columns : 1);
    pieces.push_back([=, &products] {
      for (const Operands& its : products) {
        Part part = its.part;
        (by_rows ? part.rows : part.columns) = std::min(step, length - from);
        Multiply(part, its.left + (by_rows ? kSize * from * part.left[0] : 0),
                 its.right + (by_rows ? 0 : kSize * from * part.right[1]), to);
      }
    });
  }
  return Share(threads, std::move(pieces));
}

ffi::Error Product(ffi::ThreadPool threads, ffi::AnyBuffer left, ffi::AnyBuffer right, ffi::Result<ffi::AnyBuffer> out,
                   bool left_turned, bool right_turned) {
  return Multiplied(threads, {Operands(left, right, *out, left_turned, right_turned, false)}, *out);
}

// left by the kernel of one layer and its adapter. The index is data: only here is it known where the layer begins.
ffi::Error ProductWithLayer(ffi::ThreadPool threads, ffi::AnyBuffer left, ffi::AnyBuffer kernels, ffi::AnyBuffer as,
                            ffi::AnyBuffer bs, ffi::AnyBuffer layer, ffi::Result<ffi::AnyBuffer> out) {
  const int64_t index = std::clamp<int64_t>(*layer.typed_data<int32_t>(), 0, kernels.dimensions()[0] - 1);
  const Adapted by{{kernels, index}, {as, index}, {bs, index}};
  const auto* rows = static_cast<const Number*>(left.untyped_data());
  auto* to = out->typed_data<float>();
  const int64_t inner = by.kernel.inner, panels = by.kernel.panels;
  const std::vector<int64_t> numbers = NotZero(rows, left.dimensions()[0], inner, to, panels * kPanel);
  const int64_t count = numbers.size();
  const bool small = count * inner * panels < (1 << 14), by_rows = count > kBlock;
  const int64_t length = by_rows ? count : panels;  // of what the threads share
  const int64_t parts = small ? 1 : std::clamp<int64_t>(threads.num_threads(), 1, length);
  std::vector<std::function<void()>> pieces;
  for (int64_t part = 0; count && part < parts; ++part)
    pieces.push_back([=, &by, &numbers, from = length * part / parts, end = length * (part + 1) / parts] {
      if (by_rows)
        ByAdapted(rows, numbers.data() + from, end - from, by, 0, panels, to);
      else
        ByAdapted(rows, numbers.data(), count, by, from, end, to);
    });
  return Share(threads, std::move(pieces));
}

ffi::Error SumOfTwo(ffi::ThreadPool threads, ffi::AnyBuffer left, ffi::AnyBuffer right, ffi::AnyBuffer second_left,
               ffi::AnyBuffer second_right, ffi::Result<ffi::AnyBuffer> out, bool right_turned) {
  const Operands first(left, right, *out, false, right_turned, false);
  return Multiplied(threads, {first, Operands(second_left, second_right, *out, false, right_turned, true)}, *out);
}

Inputs Of(const Sizes& its, const ffi::AnyBuffer& queries, const ffi::AnyBuffer& keys, const ffi::AnyBuffer& values,
          const ffi::AnyBuffer& seen, int64_t row, int64_t head) {
  const int32_t* first = seen.typed_data<int32_t>() + 2 * row * its.length;
  return {queries.typed_data<float>() + (row * its.length * its.heads + head * its.group) * its.width,
          keys.typed_data<float>() + (row * its.length * its.kv_heads + head) * its.width,
          values.typed_data<float>() + (row * its.length * its.kv_heads + head) * its.value_width,
          first, first + its.length};
}

// Parts of each head group, so that all threads have work.
int64_t Parts(const Sizes& its, const ffi::ThreadPool& threads) {
  const int64_t groups = its.batch * its.kv_heads;
  return std::min<int64_t>(its.blocks, std::max<int64_t>(1, 2 * threads.num_threads() / groups));
}

ffi::Error Attention(ffi::ThreadPool threads, ffi::AnyBuffer queries, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::AnyBuffer seen, ffi::Result<ffi::AnyBuffer> out) {
  const Sizes its(queries.dimensions(), values.dimensions());
  const int64_t parts = Parts(its, threads);
  std::vector<std::function<void()>> pieces;
  for (int64_t row = 0; row < its.batch; ++row)
    for (int64_t head = 0; head < its.kv_heads; ++head)
      for (int64_t part = 0; part < parts; ++part) {
        const Inputs given = Of(its, queries, keys, values, seen, row, head);
        float* to = out->typed_data<float>() + (row * its.length * its.heads + head * its.group) * its.value_width;
        pieces.push_back([=] { Forward(its, given, part, parts, to); });
      }
  return Share(threads, std::move(pieces));
}

ffi::Error Gradients(ffi::ThreadPool threads, ffi::AnyBuffer queries, ffi::AnyBuffer keys, ffi::AnyBuffer values,
                     ffi::AnyBuffer seen, ffi::AnyBuffer gradient, ffi::Result<ffi::AnyBuffer> d_queries,
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
        const Inputs given = Of(its, queries, keys, values, seen, row, head);
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

// queries [batch, heads, width], key [batch, kv_heads, width], value [batch, kv_heads, value width]; keys and values of
// all layers [layers, batch, kv_heads, slots, .]; seen [batch, 2]: which slots, from and up to.
ffi::Error OfNextToken(ffi::ThreadPool threads, ffi::AnyBuffer queries, ffi::AnyBuffer key, ffi::AnyBuffer value,
                       ffi::AnyBuffer keys, ffi::AnyBuffer values, ffi::AnyBuffer layer, ffi::AnyBuffer seen,
                       ffi::Result<ffi::AnyBuffer> out) {
  const auto cached = keys.dimensions();
  const int64_t slots = cached[3], width = cached[4], value_width = values.dimensions()[4];
  const int64_t group = queries.dimensions()[1] / cached[2], lines = cached[1] * cached[2];  // of slots, in a layer
  const int64_t index = std::clamp<int64_t>(*layer.typed_data<int32_t>(), 0, cached[0] - 1);
  const int32_t* spans = seen.typed_data<int32_t>();
  int64_t work = 0;
  for (int64_t row = 0; row < cached[1]; ++row) work += spans[2 * row + 1] * cached[2] * group * width;
  const int64_t parts = work < (1 << 17) ? 1 : std::min<int64_t>(lines, std::max<int64_t>(1, 4 * threads.num_threads()));
  std::vector<std::function<void()>> pieces;
  for (int64_t part = 0; part < parts; ++part)
    pieces.push_back([&, part] {
      for (int64_t line = part; line < lines; line += parts) {
        const int32_t* span = spans + line / cached[2] * 2;
        const int64_t end = std::clamp<int64_t>(span[1], 0, slots), from = std::clamp<int64_t>(span[0], 0, end);
        const int64_t first = (index * lines + line) * slots + from;
        NextToken(queries.typed_data<float>() + line * group * width, group,
                  {key.typed_data<float>() + line * width, keys.typed_data<float>() + first * width, width},
                  {value.typed_data<float>() + line * value_width, values.typed_data<float>() + first * value_width,
                   value_width},
                  end - from, out->typed_data<float>() + line * group * value_width);
      }
    });
  return Share(threads, std::move(pieces));
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtjaxProductWithLayer, ProductWithLayer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtjaxSumOfTwo, SumOfTwo,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(FtjaxOfNextToken, OfNextToken,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>());

}  // namespace ftjax
