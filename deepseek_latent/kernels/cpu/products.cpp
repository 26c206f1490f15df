// Products of tokens with one weight, or with one weight per expert.
//
// Letters: m tokens, e experts, n rows of a weight, k their width.

#include <ATen/ops/empty.h>
#include <ATen/ops/zero.h>
#include <torch/library.h>

#include "projections.h"

namespace latent {

// the tokens x [m k] in bfloat16 or float32, MAX_TOKENS at a time, for products with a weight in that dtype
std::vector<Inputs> inputs_of(const at::Tensor& x, at::ScalarType weight_dtype) {
  std::vector<Inputs> all;
  for (int64_t first = 0; first < x.size(0); first += MAX_TOKENS)
    all.emplace_back(std::min(MAX_TOKENS, x.size(0) - first), x.size(1), weight_dtype == at::kBFloat16);
  with_floats(x, [&](auto* data) {
    share(all.size(), 1, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++)
        all[chunk].put([&](int64_t i) { return data + (chunk * MAX_TOKENS + i) * x.stride(0); });
    });
  });
  return all;
}

// x [m k] times weight [n k], for int8 codes with scales [n] or [n groups]: [m n] in the dtype of x
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales) {
  const Weight checked = weight_of(weight, scales, "weight [n k]", {ANY, ANY});
  const int64_t n = weight.size(0);
  check_tokens(x, weight.size(1));
  at::Tensor y = at::empty({x.size(0), n}, x.options());
  if (y.numel() == 0) return y;
  const std::vector<Inputs> inputs = inputs_of(x, weight.scalar_type());
  with_rows({checked}, [&](auto rows_of) {
    const auto rows = rows_of(checked);
    with_floats(y, [&](auto* to) {
      using Result = std::remove_pointer_t<decltype(to)>;
      if (x.size(0) <= MAX_DOT_TOKENS)
        return multiply_all<std::remove_const_t<decltype(rows)>, Result>({{rows, n, &inputs[0], to}});
      const int64_t blocks = ceil_div(n, TILE_ROWS);
      share(inputs.size() * blocks, 1, 1, [&](int64_t unit, int64_t) {
        alignas(64) float sums[TILE_ROWS * MAX_TOKENS];
        const int64_t chunk = unit / blocks, first = unit % blocks * TILE_ROWS, count = std::min(TILE_ROWS, n - first);
        const auto some = rows.from(first);
        multiply(some, count, inputs[chunk], sums);
        write_rows(sums, some, count, inputs[chunk].m, to + chunk * MAX_TOKENS * n, n, first);
      });
    });
  });
  return y;
}

// Rows x [m k] in the order of experts, where each expert's rows end before ends [e] int32, times their weights [e n k], for
// int8 codes with scales [e n] or [e n groups]: [m n] in the dtype of x; rows after the last end are of no expert and give
// zeros
at::Tensor grouped(
    const at::Tensor& x, const at::Tensor& weight, const at::Tensor& ends, const std::optional<at::Tensor>& scales) {
  const Weight checked = weight_of(weight, scales, "weight [e n k]", {ANY, ANY, ANY});
  check_tokens(x, weight.size(2));
  const int64_t m = x.size(0), n = weight.size(1), k = weight.size(2);
  check(ends, "ends [e]", {weight.size(0)}, {at::kInt});
  check_contiguous(ends, "ends [e]");
  at::Tensor y = at::empty({m, n}, x.options());
  std::vector<Inputs> inputs;
  std::vector<std::pair<int64_t, int64_t>> expert_and_row;  // of the first token of each element of inputs
  int64_t row = 0;
  for (int64_t expert = 0; expert < ends.numel(); expert++) {
    const int64_t end = ends.const_data_ptr<int32_t>()[expert];
    TORCH_CHECK_VALUE(
        row <= end && end <= m, "expected ends that do not decrease, up to ", m, " rows, got ", end, " after ", row,
        " for expert ", expert, ".");
    while (row < end) {
      expert_and_row.emplace_back(expert, row);
      inputs.emplace_back(std::min(MAX_TOKENS, end - row), k, weight.scalar_type() == at::kBFloat16);
      row += inputs.back().m;
    }
  }
  if (y.numel() == 0) return y;
  y.slice(0, row).zero_();
  with_floats(x, [&](auto* data) {
    share(inputs.size(), 1, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        inputs[i].put([&](int64_t row) { return data + (expert_and_row[i].second + row) * x.stride(0); });
    });
  });
  with_rows({checked}, [&](auto rows_of) {
    const auto rows = rows_of(checked);
    with_floats(y, [&](auto* to) {
      using Result = std::remove_pointer_t<decltype(to)>;
      std::vector<Product<std::remove_const_t<decltype(rows)>, Result>> products;
      for (size_t i = 0; i < inputs.size(); i++) {
        const auto [expert, row] = expert_and_row[i];
        products.push_back({rows.from(expert * n), n, &inputs[i], to + row * n});
      }
      multiply_all(products);
    });
  });
  return y;
}

bool has_bfloat16_products() {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16)
  return true;
#else
  return false;
#endif
}

std::string instructions() {
#if defined(__AVX512F__)
  return "AVX-512";
#elif defined(__AVX2__)
  return "AVX2";
#else
  return "what the compiler makes of plain loops";
#endif
}

}  // namespace latent

TORCH_LIBRARY_FRAGMENT(deepseek_latent, library) {
  library.def("linear(Tensor x, Tensor weight, Tensor? scales=None) -> Tensor");
  library.def("grouped(Tensor x, Tensor weight, Tensor ends, Tensor? scales=None) -> Tensor");
  library.def("instructions() -> str", latent::instructions);
  library.def("has_bfloat16_products() -> bool", latent::has_bfloat16_products);
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) {
  library.impl("grouped", latent::grouped);
  library.impl("linear", latent::linear);
}
