// Projections, absorption on both sides, norms and rotations; m tokens, n rows of a weight, k their width, h heads.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "products.h"

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
  const float* factors = scales_of(scales);
  with_weight(weight, [&](auto* rows) {
    with_floats(y, [&](auto* to) {
      const auto multiply_rows = [&](int64_t chunk, int64_t first, int64_t last) {
        alignas(64) float sums[ROWS * MANY];
        const Inputs& tokens = inputs[chunk];
        multiply(rows + first * k, last - first, k, tokens, sums);
        write_rows(sums, last - first, tokens.m, factors, to + chunk * MANY * n, n, first);
      };
      if (x.size(0) <= FEW) {
        share(ceil_div(n, SOME_ROWS), 1, rows_at_once(x.size(0)) / SOME_ROWS, [&](int64_t begin, int64_t end) {
          multiply_rows(0, begin * SOME_ROWS, std::min(end * SOME_ROWS, n));
        });
        return;
      }
      const int64_t blocks = ceil_div(n, ROWS);
      share(inputs.size() * blocks, 1, 1, [&](int64_t unit, int64_t) {
        const int64_t first = unit % blocks * ROWS;
        multiply_rows(unit / blocks, first, std::min(first + ROWS, n));
      });
    });
  });
  return y;
}

// sums [c] += factors times the rows i to i + 3 of n; one that is not there is read as the last, its factor being zero
template <class T>
void add_rows(const T* rows, int64_t step, int64_t i, int64_t n, int64_t c, const float* factors, float* sums) {
  const T* four[4];
  for (int64_t r = 0; r < 4; r++) four[r] = rows + std::min(i + r, n - 1) * step;
  const int64_t whole = c / LANES * LANES;
  for (int64_t j = 0; j < whole; j += LANES) {
    Floats total = load<Floats>(sums + j);
    for (int r = 0; r < 4; r++) total += factors[r] * widen(four[r] + j);
    store(sums + j, total);
  }
  for (int64_t j = whole; j < c; j++)
    for (int r = 0; r < 4; r++) sums[j] += factors[r] * static_cast<float>(four[r][j]);
}

// x [m h n] times w [h n c] per head: [m h c] in float32
at::Tensor absorb(const at::Tensor& x, const at::Tensor& w) {
  const int64_t m = x.size(0), h = w.size(0), n = w.size(1), c = w.size(2);
  TORCH_CHECK_VALUE(w.stride(2) == 1 && x.stride(2) == 1 && x.size(1) == h && x.size(2) == n, "expected x [m h n]");
  at::Tensor y = at::empty({m, h, c}, x.options().dtype(at::kFloat));
  float* to = y.mutable_data_ptr<float>();
  with_floats(x, [&](auto* from) {
    with_floats(w, [&](auto* weight) {
      share(h, 1, 1, [&](int64_t begin, int64_t end) {
        Aligned factors(ceil_div(n, 4) * 4), sums(c);
        for (int64_t head = begin; head < end; head++)
          for (int64_t token = 0; token < m; token++) {
            widen_row(from + token * x.stride(0) + head * x.stride(1), n, factors.data());
            std::fill_n(sums.data(), c, 0.0f);
            for (int64_t i = 0; i < n; i += 4)
              add_rows(weight + head * w.stride(0), w.stride(1), i, n, c, factors.data() + i, sums.data());
            std::memcpy(to + (token * h + head) * c, sums.data(), c * sizeof(float));
          }
      });
    });
  });
  return y;
}

// x [m h c] in float32 times w [h v c] per head: [m h v] in the dtype of w
at::Tensor expand(const at::Tensor& x, const at::Tensor& w) {
  const int64_t m = x.size(0), h = w.size(0), v = w.size(1), c = w.size(2);
  TORCH_CHECK_VALUE(w.stride(2) == 1 && x.is_contiguous() && x.size(1) == h && x.size(2) == c, "expected x [m h c]");
  at::Tensor y = at::empty({m, h, v}, w.options());
  const float* from = x.const_data_ptr<float>();
  with_floats(w, [&](auto* weight) {
    auto* to = static_cast<std::remove_pointer_t<decltype(weight)>*>(y.mutable_data_ptr());
    share(h, 1, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float sums[ROWS * MANY];
      for (int64_t head = begin; head < end; head++)
        for (int64_t token = 0; token < m; token += MANY) {
          Inputs inputs(std::min(MANY, m - token), c, is_bfloat16(w));
          inputs.put([&](int64_t i) { return from + ((token + i) * h + head) * c; });
          for (int64_t first = 0; first < v; first += ROWS) {
            const int64_t count = std::min(ROWS, v - first);
            multiply(weight + head * w.stride(0) + first * w.stride(1), count, w.stride(1), inputs, sums);
            write_rows(sums, count, inputs.m, nullptr, to + (token * h + head) * v, h * v, first);
          }
        }
    });
  });
  return y;
}

// x [.. d] over the root of its mean square, times weight [d]; in float32, rounded once
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const int64_t d = x.size(-1);
  TORCH_CHECK_VALUE(
      x.is_contiguous() && weight.numel() == d && weight.scalar_type() == x.scalar_type(), "expected rows of ", d);
  at::Tensor y = at::empty(x.sizes(), x.options());
  with_floats(x, [&](auto* from) {
    using T = std::remove_pointer_t<decltype(from)>;
    const T* factors = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    share(x.numel() / d, 16, 16, [&](int64_t begin, int64_t end) {
      Aligned aligned(d);
      float* const row = aligned.data();
      for (int64_t i = begin; i < end; i++) {
        widen_row(from + i * d, d, row);
        Floats squares{};
        for (int64_t j = 0; j < d; j += LANES) squares += load<Floats>(row + j) * load<Floats>(row + j);
        const float factor = 1.0f / std::sqrt(sum(squares) / d + static_cast<float>(eps));
        for (int64_t j = 0; j < d; j++)
          to[i * d + j] = static_cast<T>(row[j] * factor * static_cast<float>(factors[j]));
      }
    });
  });
  return y;
}

// turns the pairs (2i, 2i + 1) of x [b s r] or [b s h r] by the angles whose cos and sin are [b or 1, s, r / 2] in float32
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  const at::Tensor cosines = cos.contiguous(), sines = sin.contiguous();
  const int64_t s = x.size(1), h = x.dim() == 4 ? x.size(2) : 1, r = x.size(-1), step = x.dim() == 4 ? x.stride(2) : 0;
  TORCH_CHECK_VALUE(
      x.stride(-1) == 1 && cos.sizes() == sin.sizes() && (cos.size(0) == x.size(0) || cos.size(0) == 1) &&
          cos.size(1) == s && 2 * cos.size(2) == r,
      "expected x [b s (h) r] and angles [b or 1, s, r / 2], got ", x.sizes(), " and ", cos.sizes(), ".");
  at::Tensor y = at::empty(x.sizes(), x.options());
  with_floats(x, [&](auto* from) {
    using T = std::remove_pointer_t<decltype(from)>;
    T* to = static_cast<T*>(y.mutable_data_ptr());
    share(x.size(0) * s, 16, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++)
        for (int64_t head = 0; head < h; head++) {
          const T* pairs = from + token / s * x.stride(0) + token % s * x.stride(1) + head * step;
          T* turned = to + (token * h + head) * r;
          const int64_t angle = (cos.size(0) == 1 ? token % s : token) * r / 2;
          const float *c = cosines.const_data_ptr<float>() + angle, *w = sines.const_data_ptr<float>() + angle;
          for (int64_t i = 0; i < r / 2; i++) {
            const float even = pairs[2 * i], odd = pairs[2 * i + 1];
            turned[2 * i] = static_cast<T>(even * c[i] - odd * w[i]);
            turned[2 * i + 1] = static_cast<T>(even * w[i] + odd * c[i]);
          }
        }
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
  library.def("absorb(Tensor x, Tensor w) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def("instructions() -> str", latent::instructions);
  library.def("has_bfloat16_products() -> bool", latent::has_bfloat16_products);
  library.def("expand(Tensor x, Tensor w) -> Tensor");
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) {
  library.impl("linear", latent::linear);
  library.impl("absorb", latent::absorb);
  library.impl("rms_norm", latent::rms_norm);
  library.impl("rotate", latent::rotate);
  library.impl("expand", latent::expand);
}
