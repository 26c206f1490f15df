// Products with weights of bfloat16, int8 or float32, read where they lie and summed in float32.
//
// Letters: m tokens, n rows of a weight, k their width, h heads, e experts, d model width, f width of an expert.
// Few tokens go row by row as dot products, at the speed at which memory gives the weights; many have their tokens in
// the lanes of vectors, so that a row is widened once for all of them.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <optional>
#include <vector>

#include "share.h"
#include "vectors.h"

namespace latent {

constexpr int64_t ROWS = 64;       // rows of a weight that a thread takes at once
constexpr int64_t FEW = 8;         // tokens up to which rows become dot products
constexpr int64_t MANY = 256;      // tokens that are multiplied at once: their inputs stay in the second cache
constexpr int64_t GROUP = 2 * LANES;  // tokens that share the lanes of one step
constexpr int64_t AHEAD = 1024;    // elements from what is read to what is asked for
constexpr int64_t DEPTH = 256;     // of a product with lanes: a group's inputs then stay in the first cache

// At most MANY tokens as products read them: few one after the other, padded with zeros to whole vectors; many side by
// side, in groups of 32 of which each is [k 32].
struct Inputs {
  int64_t m, k, padded;
  Aligned data;

  Inputs(int64_t m, int64_t k)
      : m(m), k(k), padded(ceil_div(k, LANES) * LANES),
        data(is_few() ? m * padded : ceil_div(m, GROUP) * GROUP * k) {}
  bool is_few() const { return m <= FEW; }
  const float* token(int64_t i) const { return data.data() + i * padded; }
  const float* group(int64_t g) const { return data.data() + g * k * GROUP; }
  float& at(int64_t token, int64_t i) {
    return data.data()[is_few() ? token * padded + i : (token / GROUP * k + i) * GROUP + token % GROUP];
  }
  // where from(token) is the start of one; a few columns of all, then the next
  template <class From>
  void put(From from) {
    for (int64_t start = 0; start < k; start += LANES)
      for (int64_t token = 0; token < m; token++)
        for (int64_t i = start; i < std::min(start + LANES, k); i++)
          at(token, i) = static_cast<float>(from(token)[i]);
  }
};

// R rows, `step` apart, times M tokens: to[r * to_step + token]
template <class T, int R, int M>
inline void dot_rows(const T* rows, int64_t step, const Inputs& x, int64_t first, float* to, int64_t to_step) {
  Floats sums[R][M] = {};
  const int64_t whole = x.k / LANES * LANES;
  for (int64_t i = 0; i < whole; i += LANES)
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(rows + r * step + i + AHEAD);
      const Floats row = widen(rows + r * step + i);
      for (int m = 0; m < M; m++) sums[r][m] += row * load<Floats>(x.token(first + m) + i);
    }
  if (whole < x.k)
    for (int r = 0; r < R; r++) {
      const Floats row = widen_some(rows + r * step + whole, x.k - whole);
      for (int m = 0; m < M; m++) sums[r][m] += row * load<Floats>(x.token(first + m) + whole);
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) to[r * to_step + first + m] = sum(sums[r][m]);
}

template <class T, int M>
inline void dot_block(const T* rows, int64_t n, int64_t step, const Inputs& x, int64_t first, float* to) {
  // four rows a quarter apart: four streams, each of which goes on behind the end of its row
  const int64_t quarter = n / 4;
  for (int64_t r = 0; r < quarter; r++)
    dot_rows<T, 4, M>(rows + r * step, quarter * step, x, first, to + r * x.m, quarter * x.m);
  for (int64_t r = 4 * quarter; r < n; r++) dot_rows<T, 1, M>(rows + r * step, step, x, first, to + r * x.m, x.m);
}

// n <= ROWS rows of width x.k, `step` apart, times all tokens: to[row][token]
template <class T>
void multiply(const T* rows, int64_t n, int64_t step, const Inputs& x, float* to) {
  if (x.is_few()) {
    int64_t first = 0;
    for (; first + 4 <= x.m; first += 4) dot_block<T, 4>(rows, n, step, x, first, to);
    for (; first + 2 <= x.m; first += 2) dot_block<T, 2>(rows, n, step, x, first, to);
    for (; first < x.m; first++) dot_block<T, 1>(rows, n, step, x, first, to);
    return;
  }
  alignas(64) float tile[ROWS * DEPTH], sums[ROWS * MANY];
  const int64_t groups = ceil_div(x.m, GROUP), lanes = groups * GROUP;
  std::fill(sums, sums + n * lanes, 0.0f);
  for (int64_t start = 0; start < x.k; start += DEPTH) {
    const int64_t depth = std::min(DEPTH, x.k - start);
    for (int64_t r = 0; r < n; r++) widen_row(rows + r * step + start, depth, tile + r * DEPTH);
    for (int64_t g = 0; g < groups; g++) {
      const float* group = x.group(g) + start * GROUP;
      for (int64_t r = 0; r < n; r += 8)
        // rows behind the last are computed with and not used
        multiply_lanes<8, 2>(tile + r * DEPTH, DEPTH, 1, depth, group, GROUP, sums + r * lanes + g * GROUP, lanes);
    }
  }
  for (int64_t r = 0; r < n; r++) std::memcpy(to + r * x.m, sums + r * lanes, x.m * sizeof(float));
}

// calls body with the data of a tensor whose dtype is known when it runs
template <class Body>
void with_floats(const at::Tensor& x, Body body) {
  if (x.scalar_type() == at::kBFloat16) return body(static_cast<c10::BFloat16*>(x.data_ptr()));
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, "expected bfloat16 or float32, got ", x.scalar_type(), ".");
  body(static_cast<float*>(x.data_ptr()));
}

template <class Body>
void with_weight(const at::Tensor& weight, Body body) {
  if (weight.scalar_type() == at::kChar) return body(static_cast<int8_t*>(weight.data_ptr()));
  with_floats(weight, body);
}

// the tokens x [m k] of bfloat16 or float32, MANY at a time
std::vector<Inputs> inputs_of(const at::Tensor& x) {
  std::vector<Inputs> all;
  for (int64_t first = 0; first < x.size(0); first += MANY)
    all.emplace_back(std::min(MANY, x.size(0) - first), x.size(1));
  with_floats(x, [&](auto* data) {
    share(all.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; chunk++)
        all[chunk].put([&](int64_t i) { return data + (chunk * MANY + i) * x.stride(0); });
    });
  });
  return all;
}

// the scales of int8 weights, one per row; other weights have none, and no row is scaled
const float* scales_of(const std::optional<at::Tensor>& scales) {
  return scales ? scales->const_data_ptr<float>() : nullptr;
}

inline float scale(const float* scales, int64_t row) { return scales ? scales[row] : 1.0f; }

// sums [rows][tokens], times a scale per row, into y [tokens, n] from column `first` on
template <class T>
void write_rows(const float* sums, int64_t rows, int64_t m, const float* scales, T* y, int64_t n, int64_t first) {
  // a few tokens of all rows, then the next: both sides stay in the first cache
  for (int64_t start = 0; start < m; start += LANES)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t i = start; i < std::min(start + LANES, m); i++)
        y[i * n + first + r] = static_cast<T>(sums[r * m + i] * scale(scales, first + r));
}

void check_product(const at::Tensor& x, const at::Tensor& weight, int64_t k) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.stride(1) == 1 && x.size(1) == k, "expected tokens [m ", k, "], got ", x.sizes(), ".");
  TORCH_CHECK_VALUE(weight.is_contiguous(), "expected a weight whose rows follow each other, got ", weight.strides());
}

// x [m k] times weight [n k], int8 ones times scales [n]: [m n] in the dtype of x
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales) {
  const int64_t n = weight.size(0), k = weight.size(1);
  check_product(x, weight, k);
  const std::vector<Inputs> inputs = inputs_of(x);
  at::Tensor y = at::empty({x.size(0), n}, x.options());
  const float* factors = scales_of(scales);
  const int64_t blocks = ceil_div(n, ROWS);
  with_weight(weight, [&](auto* rows) {
    with_floats(y, [&](auto* to) {
      share(inputs.size() * blocks, 1, [&](int64_t begin, int64_t end) {
        alignas(64) float sums[ROWS * MANY];
        for (int64_t unit = begin; unit < end; unit++) {
          const int64_t chunk = unit / blocks, first = unit % blocks * ROWS, count = std::min(ROWS, n - first);
          multiply(rows + first * k, count, k, inputs[chunk], sums);
          write_rows(sums, count, inputs[chunk].m, factors, to + chunk * MANY * n, n, first);
        }
      });
    });
  });
  return y;
}

// What one expert has to do for at most MANY tokens: which, how much of each, and what it knows of them on the way.
struct Work {
  int64_t expert;
  std::vector<int64_t> tokens;
  std::vector<float> shares;
  std::vector<Inputs> steps;  // the tokens, then act(gate x) * up x
};

std::vector<Work> sorted_by_expert(const at::Tensor& chosen, const at::Tensor& shares, int64_t num_experts) {
  std::vector<Work> works;
  std::vector<int64_t> place(num_experts, -1);
  const int64_t* expert_of = chosen.const_data_ptr<int64_t>();
  const float* share_of = shares.const_data_ptr<float>();
  for (int64_t i = 0; i < chosen.numel(); i++) {
    const int64_t expert = expert_of[i];
    // expert parallelism marks the choices of other ranks by an index past the last expert
    if (expert >= num_experts) continue;
    if (place[expert] < 0 || works[place[expert]].tokens.size() == MANY) {
      place[expert] = works.size();
      works.push_back({expert, {}, {}, {}});
    }
    works[place[expert]].tokens.push_back(i / chosen.size(1));
    works[place[expert]].shares.push_back(share_of[i]);
  }
  return works;
}

// SwiGLU of the chosen experts: x [m d], gate_up [e 2f d], down [e d f], chosen [m k] int64, shares [m k] float32, and
// for int8 weights a scale per row [e 2f], [e d]: [m d] in the dtype of x
at::Tensor experts(
    const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& chosen,
    const at::Tensor& shares, const std::optional<at::Tensor>& gate_up_scales,
    const std::optional<at::Tensor>& down_scales) {
  const int64_t m = x.size(0), d = x.size(1), f = down.size(2);
  check_product(x, gate_up, gate_up.size(2));
  check_product(x, down, down.size(1));
  std::vector<Work> works = sorted_by_expert(chosen.contiguous(), shares.contiguous(), gate_up.size(0));
  const float *in_scales = scales_of(gate_up_scales), *out_scales = scales_of(down_scales);

  share(works.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t count = works[i].tokens.size();
      works[i].steps = {Inputs(count, d), Inputs(count, f)};
      with_floats(x, [&](auto* data) {
        works[i].steps[0].put([&](int64_t t) { return data + works[i].tokens[t] * x.stride(0); });
      });
    }
  });

  const int64_t blocks = ceil_div(f, ROWS);
  with_weight(gate_up, [&](auto* weight) {
    share(works.size() * blocks, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float gates[ROWS * MANY], ups[ROWS * MANY];
      for (int64_t unit = begin; unit < end; unit++) {
        Work& work = works[unit / blocks];
        const Inputs& inputs = work.steps[0];
        const int64_t first = unit % blocks * ROWS, count = std::min(ROWS, f - first);
        const int64_t gate_row = work.expert * 2 * f + first, up_row = gate_row + f;
        multiply(weight + gate_row * d, count, d, inputs, gates);
        multiply(weight + up_row * d, count, d, inputs, ups);
        for (int64_t r = 0; r < count; r++)
          for (int64_t t = 0; t < inputs.m; t++) {
            const float gate = gates[r * inputs.m + t] * scale(in_scales, gate_row + r);
            const float up = ups[r * inputs.m + t] * scale(in_scales, up_row + r);
            work.steps[1].at(t, first + r) = gate / (1.0f + std::exp(-gate)) * up;
          }
      }
    });
  });

  at::Tensor y = at::empty({m, d}, x.options());
  with_weight(down, [&](auto* weight) {
    share(ceil_div(d, ROWS), 2, [&](int64_t begin, int64_t end) {
      const int64_t first_column = begin * ROWS, columns = std::min(end * ROWS, d) - first_column;
      alignas(64) float sums[ROWS * MANY];
      std::vector<float> total(m * columns);
      // an expert's inputs stay at hand while all its rows pass
      for (const Work& work : works) {
        const Inputs& inputs = work.steps[1];
        for (int64_t first = 0; first < columns; first += ROWS) {
          const int64_t row = work.expert * d + first_column + first, count = std::min(ROWS, columns - first);
          multiply(weight + row * f, count, f, inputs, sums);
          for (int64_t t = 0; t < inputs.m; t++)
            for (int64_t r = 0; r < count; r++)
              total[work.tokens[t] * columns + first + r] +=
                  work.shares[t] * sums[r * inputs.m + t] * scale(out_scales, row + r);
        }
      }
      with_floats(y, [&](auto* to) {
        using T = std::remove_pointer_t<decltype(to)>;
        for (int64_t i = 0; i < m; i++)
          for (int64_t c = 0; c < columns; c++)
            to[i * d + first_column + c] = static_cast<T>(total[i * columns + c]);
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
      share(h, 1, [&](int64_t begin, int64_t end) {
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
    share(h, 1, [&](int64_t begin, int64_t end) {
      alignas(64) float sums[ROWS * MANY];
      for (int64_t head = begin; head < end; head++)
        for (int64_t token = 0; token < m; token += MANY) {
          Inputs inputs(std::min(MANY, m - token), c);
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
    share(x.numel() / d, 16, [&](int64_t begin, int64_t end) {
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
  library.def(
      "experts(Tensor x, Tensor gate_up, Tensor down, Tensor chosen, Tensor shares, Tensor? gate_up_scales=None, "
      "Tensor? down_scales=None) -> Tensor");
  library.def("absorb(Tensor x, Tensor w) -> Tensor");
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("instructions() -> str", latent::instructions);
  library.def("has_bfloat16_products() -> bool", latent::has_bfloat16_products);
  library.def("expand(Tensor x, Tensor w) -> Tensor");
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) {
  library.impl("linear", latent::linear);
  library.impl("experts", latent::experts);
  library.impl("absorb", latent::absorb);
  library.impl("rms_norm", latent::rms_norm);
  library.impl("expand", latent::expand);
}
