// Products of tokens with a weight; m tokens, n rows of a weight, k their width.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "projections.h"

namespace latent {

// the tokens x [m k] of bfloat16 or float32, MANY at a time, for products with a weight
std::vector<Inputs> inputs_of(const at::Tensor& x, const at::Tensor& weight) {
  std::vector<Inputs> all;
  for (int64_t first = 0; first < x.size(0); first += MANY)
    all.emplace_back(std::min(MANY, x.size(0) - first), x.size(1), is_bfloat16(weight));
  with_floats(x, [&](auto* data) {
    share(all.size(), 1, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++)
        all[chunk].put([&](int64_t i) { return data + (chunk * MANY + i) * x.stride(0); });
    });
  });
  return all;
}

// x [m k] times weight [n k], int8 ones times scales [n]: [m n] in the dtype of x
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales) {
  const int64_t n = weight.size(0), k = weight.size(1);
  check_product(x, weight, k);
  const std::vector<Inputs> inputs = inputs_of(x, weight);
  at::Tensor y = at::empty({x.size(0), n}, x.options());
  if (inputs.empty()) return y;
  const float* factors = scales_of(scales);
  with_weight(weight, [&](auto* rows) {
    with_floats(y, [&](auto* to) {
      using T = std::remove_pointer_t<decltype(rows)>;
      using Result = std::remove_pointer_t<decltype(to)>;
      if (x.size(0) <= FEW) return multiply_all<T, Result>({{rows, factors, n, &inputs[0], to}});
      const int64_t blocks = ceil_div(n, ROWS);
      share(inputs.size() * blocks, 1, 1, [&](int64_t unit, int64_t) {
        alignas(64) float sums[ROWS * MANY];
        const int64_t chunk = unit / blocks, first = unit % blocks * ROWS, count = std::min(ROWS, n - first);
        multiply(rows + first * k, count, k, inputs[chunk], sums);
        write_rows(sums, count, inputs[chunk].m, factors, to + chunk * MANY * n, n, first);
      });
    });
  });
  return y;
}

// rows x [m k] in the order of experts, of which each one's end before ends [e] int32, times their weights [e n k]: [m n]
// in the dtype of x
at::Tensor grouped(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& ends) {
  const int64_t n = weight.size(1), k = weight.size(2);
  check_product(x, weight, k);
  TORCH_CHECK_VALUE(
      ends.scalar_type() == at::kInt && ends.is_contiguous() && ends.numel() == weight.size(0),
      "expected int32 ends of all experts.");
  std::vector<Inputs> inputs;
  std::vector<std::pair<int64_t, int64_t>> of;  // expert, first row
  for (int64_t expert = 0, row = 0; expert < ends.numel(); expert++)
    for (const int64_t end = std::min<int64_t>(ends.const_data_ptr<int32_t>()[expert], x.size(0)); row < end;) {
      of.emplace_back(expert, row);
      inputs.emplace_back(std::min(MANY, end - row), k, is_bfloat16(weight));
      row += inputs.back().m;
    }
  at::Tensor y = at::empty({x.size(0), n}, x.options());
  with_floats(x, [&](auto* data) {
    share(inputs.size(), 1, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++)
        inputs[i].put([&](int64_t row) { return data + (of[i].second + row) * x.stride(0); });
    });
  });
  with_floats(weight, [&](auto* rows) {
    with_floats(y, [&](auto* to) {
      using T = std::remove_pointer_t<decltype(rows)>;
      using Result = std::remove_pointer_t<decltype(to)>;
      std::vector<Product<T, Result>> products;
      for (size_t i = 0; i < of.size(); i++)
        products.push_back({rows + of[i].first * n * k, nullptr, n, &inputs[i], to + of[i].second * n});
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
  library.def("grouped(Tensor x, Tensor weight, Tensor ends) -> Tensor");
  library.def("instructions() -> str", latent::instructions);
  library.def("has_bfloat16_products() -> bool", latent::has_bfloat16_products);
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) {
  library.impl("grouped", latent::grouped);
  library.impl("linear", latent::linear);
}
