// The operations around attention: norms, rotations, projections into queries and latents, absorption on both sides.
//
// Letters: b batch, s tokens of a sequence, m tokens of all sequences, h heads, d model width, a width of the queries' input,
// n/r/v content, rotary and value width per head, c latent width.

#include "projections.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

namespace latent {

// sums [c] += factors times rows i to i + 3 of n; a row past the last one is read as the last one, and its factor is zero
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
  check(w, "w [h n c]", {ANY, ANY, ANY}, FLOATS);
  const int64_t h = w.size(0), n = w.size(1), c = w.size(2);
  check(x, "x [m h n]", {ANY, h, n}, FLOATS);
  check_rows(w, "w [h n c]");
  check_rows(x, "x [m h n]");
  const int64_t m = x.size(0);
  at::Tensor y = at::empty({m, h, c}, x.options().dtype(at::kFloat));
  if (y.numel() == 0) return y;
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
  check(w, "w [h v c]", {ANY, ANY, ANY}, FLOATS);
  const int64_t h = w.size(0), v = w.size(1), c = w.size(2);
  check(x, "x [m h c]", {ANY, h, c}, {at::kFloat});
  check_rows(w, "w [h v c]");
  check_contiguous(x, "x [m h c]");
  const int64_t m = x.size(0);
  at::Tensor y = at::empty({m, h, v}, w.options());
  if (y.numel() == 0) return y;
  const float* from = x.const_data_ptr<float>();
  with_floats(w, [&](auto* weight) {
    auto* to = static_cast<std::remove_pointer_t<decltype(weight)>*>(y.mutable_data_ptr());
    share(h, 1, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float sums[TILE_ROWS * MAX_TOKENS];
      for (int64_t head = begin; head < end; head++)
        for (int64_t token = 0; token < m; token += MAX_TOKENS) {
          const Rows<std::remove_pointer_t<decltype(weight)>> rows(weight + head * w.stride(0), w.stride(1));
          Inputs inputs(std::min(MAX_TOKENS, m - token), c, w.scalar_type() == at::kBFloat16);
          inputs.put([&](int64_t i) { return from + ((token + i) * h + head) * c; });
          for (int64_t first = 0; first < v; first += TILE_ROWS) {
            const int64_t count = std::min(TILE_ROWS, v - first);
            multiply(rows.from(first), count, inputs, sums);
            write_rows(sums, rows.from(first), count, inputs.m, to + (token * h + head) * v, h * v, first);
          }
        }
    });
  });
  return y;
}

// divides x [d] by the root of its mean square and multiplies it by weight [d]; y may be x
template <class T>
void norm_row(const T* x, const T* weight, int64_t d, float eps, T* y) {
  Aligned aligned(d);
  float* const row = aligned.data();
  widen_row(x, d, row);
  Floats squares{};
  for (int64_t j = 0; j < d; j += LANES) squares += load<Floats>(row + j) * load<Floats>(row + j);
  const float factor = 1.0f / std::sqrt(sum(squares) / d + eps);
  for (int64_t j = 0; j < d; j++) y[j] = static_cast<T>(row[j] * factor * static_cast<float>(weight[j]));
}

// RMSNorm of x [.. d] with weight [d], in float32, rounded once
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check(weight, "weight [d]", {ANY}, FLOATS);
  const int64_t d = weight.size(0);
  TORCH_CHECK_VALUE(x.dim() > 0 && x.size(-1) == d, "expected x [.. d] with rows of ", d, ", got ", x.sizes(), ".");
  check(x, "x [.. d]", x.sizes(), {weight.scalar_type()});
  check_contiguous(weight, "weight [d]");
  check_contiguous(x, "x [.. d]");
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  with_floats(x, [&](auto* from) {
    using T = std::remove_pointer_t<decltype(from)>;
    const T* factors = static_cast<const T*>(weight.const_data_ptr());
    T* to = static_cast<T*>(y.mutable_data_ptr());
    share(x.numel() / d, 16, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) norm_row(from + i * d, factors, d, static_cast<float>(eps), to + i * d);
    });
  });
  return y;
}

// rotates the pairs (2i, 2i + 1) of x [r] by angles [r / 2]; y may be x
template <class T>
void rotate_row(const T* x, const float* cos, const float* sin, int64_t r, T* y) {
  for (int64_t i = 0; i < r / 2; i++) {
    const float even = x[2 * i], odd = x[2 * i + 1];
    y[2 * i] = static_cast<T>(even * cos[i] - odd * sin[i]);
    y[2 * i + 1] = static_cast<T>(even * sin[i] + odd * cos[i]);
  }
}

// throws unless the angles of b sequences of s tokens have their cos and sin [b or 1, s, r / 2] in float32
void check_angles(const at::Tensor& cos, const at::Tensor& sin, int64_t b, int64_t s) {
  check(cos, "cos [b or 1, s, r / 2]", {cos.dim() > 0 && cos.size(0) == 1 ? 1 : b, s, ANY}, {at::kFloat});
  check(sin, "sin, like cos,", cos.sizes(), {at::kFloat});
}

// rotates the pairs (2i, 2i + 1) of x [b s r] or [b s h r] by the angles whose cos and sin are [b or 1, s, r / 2] in float32
at::Tensor rotate(const at::Tensor& x, const at::Tensor& cos, const at::Tensor& sin) {
  TORCH_CHECK_VALUE(x.dim() == 3 || x.dim() == 4, "expected x [b s r] or [b s h r], got ", x.sizes(), ".");
  check_angles(cos, sin, x.size(0), x.size(1));
  TORCH_CHECK_VALUE(
      x.size(-1) == 2 * cos.size(2), "expected x [.. r] with r = ", 2 * cos.size(2), ", twice the number of angles, got ",
      x.sizes(), ".");
  check(x, "x [.. r]", x.sizes(), FLOATS);
  check_rows(x, "x [.. r]");
  const at::Tensor cosines = cos.contiguous(), sines = sin.contiguous();
  const int64_t s = x.size(1), h = x.dim() == 4 ? x.size(2) : 1, r = x.size(-1), step = x.dim() == 4 ? x.stride(2) : 0;
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  with_floats(x, [&](auto* from) {
    using T = std::remove_pointer_t<decltype(from)>;
    T* to = static_cast<T*>(y.mutable_data_ptr());
    share(x.size(0) * s, 16, 16, [&](int64_t begin, int64_t end) {
      for (int64_t token = begin; token < end; token++)
        for (int64_t head = 0; head < h; head++) {
          const T* pairs = from + token / s * x.stride(0) + token % s * x.stride(1) + head * step;
          T* turned = to + (token * h + head) * r;
          const int64_t angle = (cos.size(0) == 1 ? token % s : token) * r / 2;
          const float* c = cosines.const_data_ptr<float>() + angle;
          const float* w = sines.const_data_ptr<float>() + angle;
          rotate_row(pairs, c, w, r, turned);
        }
    });
  });
  return y;
}

// throws unless runs are pairs of a first row and a number of rows, in order and within n rows
void check_runs(at::IntArrayRef runs, int64_t n) {
  int64_t end = 0;
  bool fits = runs.size() % 2 == 0;
  for (size_t i = 0; fits && i < runs.size(); i += 2) {
    fits = runs[i] >= end && runs[i] <= n && runs[i + 1] > 0 && runs[i + 1] <= n - runs[i];
    end = runs[i] + runs[i + 1];
  }
  TORCH_CHECK_VALUE(
      fits, "expected q_runs as pairs of a first row and a number of rows, in order and within ", n, " rows, got ", runs, ".");
}

// true if the first elements of each row of q outside of these runs are still zero
bool are_others_zero(const at::Tensor& q, at::IntArrayRef runs) {
  const char* const data = static_cast<const char*>(q.const_data_ptr());
  const int64_t row_bytes = q.size(1) * q.element_size(), bytes = std::min<int64_t>(row_bytes, 64);
  char any = 0;
  int64_t row = 0;
  for (size_t i = 0; i <= runs.size(); i += 2) {
    for (const int64_t end = i < runs.size() ? runs[i] : q.size(0); row < end; row++)
      for (int64_t j = 0; j < bytes; j++) any |= data[row * row_bytes + j];
    if (i < runs.size()) row += runs[i + 1];
  }
  return any == 0;
}

// Projects few tokens in one pass over both weights: q_x [b s a] times q [h(n+r) a], with the last r of each head rotated, and
// x [b s d] times kv_a [c+r d], with the first c normalized and the last r rotated; int8 codes come with scales. `q_runs` are
// runs of rows outside of which q was found to be zero, if it was: these rows are not read, except for their first elements, which
// are no longer zero after training or merging.
std::tuple<at::Tensor, at::Tensor> project(
    const at::Tensor& q_x, const at::Tensor& q, const std::optional<at::Tensor>& q_scales, const at::Tensor& x,
    const at::Tensor& kv_a, const std::optional<at::Tensor>& kv_a_scales, const at::Tensor& norm, double eps,
    const at::Tensor& cos, const at::Tensor& sin, int64_t head_width, at::IntArrayRef q_runs) {
  check(x, "x [b s d]", {ANY, ANY, ANY}, FLOATS);
  check(q_x, "q_x [b s a]", {x.size(0), x.size(1), ANY}, {x.scalar_type()});
  check(norm, "norm [c]", {ANY}, {x.scalar_type()});
  check_contiguous(norm, "norm [c]");
  check_angles(cos, sin, x.size(0), x.size(1));
  const int64_t s = x.size(1), m = x.size(0) * s, c = norm.size(0), r = 2 * cos.size(2);
  TORCH_CHECK_VALUE(m <= MAX_DOT_TOKENS, "expected at most ", MAX_DOT_TOKENS, " tokens, got ", m, "; use `linear`.");
  const Weight q_weight = weight_of(q, q_scales, "q [h(n+r) a]", {ANY, q_x.size(2)});
  const Weight kv_weight = weight_of(kv_a, kv_a_scales, "kv_a [c+r d]", {c + r, x.size(2)});
  TORCH_CHECK_VALUE(
      head_width > 0 && head_width >= r && q.size(0) % head_width == 0, "expected head_width, at least r = ", r, ", to divide ",
      "the ", q.size(0), " rows of q, got ", head_width, ".");
  check_runs(q_runs, q.size(0));
  const at::Tensor cosines = cos.contiguous(), sines = sin.contiguous();
  const at::Tensor flat_q_x = q_x.reshape({m, q_x.size(2)}).contiguous(), flat_x = x.reshape({m, x.size(2)}).contiguous();
  const bool skips_zeros = !q_runs.empty() && are_others_zero(q, q_runs);
  at::Tensor queries = at::empty({x.size(0), s, q.size(0)}, x.options());
  if (skips_zeros) queries.zero_();
  at::Tensor rows = at::empty({x.size(0), s, c + r}, x.options());
  if (m == 0) return {queries, rows};
  const std::vector<Inputs> for_q = inputs_of(flat_q_x, q.scalar_type());
  const std::vector<Inputs> for_kv = inputs_of(flat_x, kv_a.scalar_type());
  with_rows({q_weight, kv_weight}, [&](auto rows_of) {
    using R = decltype(rows_of(q_weight));
    with_floats(queries, [&](auto* query) {
      using Result = std::remove_pointer_t<decltype(query)>;
      Result* row = static_cast<Result*>(rows.mutable_data_ptr());
      std::vector<Product<R, Result>> products{{rows_of(kv_weight), c + r, &for_kv[0], row}};
      if (!skips_zeros) products.push_back({rows_of(q_weight), q.size(0), &for_q[0], query});
      for (size_t i = 0; skips_zeros && i < q_runs.size(); i += 2)
        products.push_back({rows_of(q_weight).from(q_runs[i]), q_runs[i + 1], &for_q[0], query + q_runs[i], q.size(0)});
      multiply_all(products);
      for (int64_t token = 0; token < m; token++, row += c + r) {
        const int64_t angle = (cos.size(0) == 1 ? token % s : token) * r / 2;
        const float *turn = cosines.const_data_ptr<float>() + angle, *half = sines.const_data_ptr<float>() + angle;
        norm_row(row, static_cast<const Result*>(norm.const_data_ptr()), c, static_cast<float>(eps), row);
        rotate_row(row + c, turn, half, r, row + c);
        for (int64_t head = 0; head < q.size(0) / head_width; head++, query += head_width)
          rotate_row(query + head_width - r, turn, half, r, query + head_width - r);
      }
    });
  });
  return {queries, rows};
}

}  // namespace latent

TORCH_LIBRARY_FRAGMENT(deepseek_latent, library) {
  library.def("absorb(Tensor x, Tensor w) -> Tensor");
  library.def("expand(Tensor x, Tensor w) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("rotate(Tensor x, Tensor cos, Tensor sin) -> Tensor");
  library.def(
      "project(Tensor q_x, Tensor q, Tensor? q_scales, Tensor x, Tensor kv_a, Tensor? kv_a_scales, Tensor norm, "
      "float eps, Tensor cos, Tensor sin, int head_width, int[] q_runs=[]) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) {
  library.impl("absorb", latent::absorb);
  library.impl("expand", latent::expand);
  library.impl("rms_norm", latent::rms_norm);
  library.impl("rotate", latent::rotate);
  library.impl("project", latent::project);
}
