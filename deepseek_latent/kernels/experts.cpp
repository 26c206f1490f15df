// SwiGLU, down(act(gate x) * up x), of one layer or of the chosen experts, all weights in two passes.
//
// Letters: m tokens, e experts, d model width, f inner width.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <numeric>

#include "products.h"

namespace latent {

// What one SwiGLU has to do for at most MANY tokens: its weights with the scales of int8 ones, which tokens, how much of
// each, and what it knows of them on the way.
template <class T>
struct Work {
  const T *gate, *up, *down;                              // [f d], [f d], [d f]
  const float *gate_scales, *up_scales, *down_scales;     // [f], [f], [d], or null
  std::vector<int64_t> tokens = {};
  std::vector<float> shares = {};
  std::vector<Inputs> steps = {};  // the tokens, then act(gate x) * up x
};

inline const float* from_row(const float* scales, int64_t row) { return scales ? scales + row : nullptr; }

// x [m d] in bfloat16 or float32: the sum over all works [m d] in the same dtype
template <class T>
at::Tensor sum_of(std::vector<Work<T>> works, const at::Tensor& x, int64_t f) {
  constexpr bool is_paired = std::is_same_v<T, c10::BFloat16>;
  const int64_t m = x.size(0), d = x.size(1);
  share(works.size(), 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t count = works[i].tokens.size();
      works[i].steps = {Inputs(count, d, is_paired), Inputs(count, f, is_paired)};
      with_floats(x, [&](auto* data) {
        works[i].steps[0].put([&](int64_t t) { return data + works[i].tokens[t] * x.stride(0); });
      });
    }
  });

  const int64_t blocks = ceil_div(f, SOME_ROWS), most = rows_at_once(m) / SOME_ROWS;
  // with many tokens a short piece would read all their inputs for a few rows
  const int64_t least = m <= FEW ? 1 : most;
  share(works.size() * blocks, least, most, [&](int64_t begin, int64_t end) {
    alignas(64) float gates[ROWS * MANY], ups[ROWS * MANY];
    // what was handed out may end in the next work
    for (int64_t block = begin, until; block < end; block = until) {
      Work<T>& work = works[block / blocks];
      until = std::min(end, (block / blocks + 1) * blocks);
      const int64_t first = block % blocks * SOME_ROWS, count = std::min(first + (until - block) * SOME_ROWS, f) - first;
      const Inputs& tokens = work.steps[0];
      multiply(work.gate + first * d, count, d, tokens, gates);
      multiply(work.up + first * d, count, d, tokens, ups);
      for (int64_t r = 0; r < count; r++)
        for (int64_t t = 0; t < tokens.m; t++) {
          const float gate = gates[r * tokens.m + t] * scale(work.gate_scales, first + r);
          const float up = ups[r * tokens.m + t] * scale(work.up_scales, first + r);
          work.steps[1].at(t, first + r) = gate / (1.0f + std::exp(-gate)) * up;
        }
    }
  });

  at::Tensor y = at::empty({m, d}, x.options());
  share(ceil_div(d, SOME_ROWS), 2 * least, 2 * most, [&](int64_t begin, int64_t end) {
    const int64_t first_column = begin * SOME_ROWS, columns = std::min(end * SOME_ROWS, d) - first_column;
    alignas(64) float sums[ROWS * MANY];
    std::vector<float> total(m * columns);
    // a work's inputs stay at hand while all its rows pass
    for (const Work<T>& work : works) {
      const Inputs& tokens = work.steps[1];
      const int64_t at_once = rows_at_once(tokens.m);
      for (int64_t first = 0; first < columns; first += at_once) {
        const int64_t row = first_column + first, count = std::min(at_once, columns - first);
        multiply(work.down + row * f, count, f, tokens, sums);
        for (int64_t t = 0; t < tokens.m; t++)
          for (int64_t r = 0; r < count; r++)
            total[work.tokens[t] * columns + first + r] +=
                work.shares[t] * sums[r * tokens.m + t] * scale(work.down_scales, row + r);
      }
    }
    with_floats(y, [&](auto* to) {
      using Result = std::remove_pointer_t<decltype(to)>;
      for (int64_t i = 0; i < m; i++)
        for (int64_t c = 0; c < columns; c++)
          to[i * d + first_column + c] = static_cast<Result>(total[i * columns + c]);
    });
  });
  return y;
}

// SwiGLU of the chosen experts: x [m d], gate_up [e 2f d], down [e d f], chosen [m k] int64, shares [m k] float32, and
// for int8 weights a scale per row [e 2f], [e d]: [m d] in the dtype of x
at::Tensor experts(
    const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& chosen,
    const at::Tensor& shares, const std::optional<at::Tensor>& gate_up_scales,
    const std::optional<at::Tensor>& down_scales) {
  const int64_t num_experts = down.size(0), d = down.size(1), f = down.size(2);
  check_product(x, gate_up, gate_up.size(2));
  check_product(x, down, d);
  const at::Tensor in_order = chosen.contiguous(), shares_in_order = shares.contiguous();
  const int64_t* expert_of = in_order.const_data_ptr<int64_t>();
  const float* share_of = shares_in_order.const_data_ptr<float>();
  const float *in_scales = scales_of(gate_up_scales), *out_scales = scales_of(down_scales);
  at::Tensor y;
  with_weight(gate_up, [&](auto* in) {
    using T = std::remove_pointer_t<decltype(in)>;
    const T* out = static_cast<const T*>(down.const_data_ptr());
    std::vector<Work<T>> works;
    std::vector<int64_t> place(num_experts, -1);
    for (int64_t i = 0; i < chosen.numel(); i++) {
      const int64_t expert = expert_of[i], row = expert * 2 * f;
      // expert parallelism marks the choices of other ranks by an index past the last expert
      if (expert >= num_experts) continue;
      if (place[expert] < 0 || works[place[expert]].tokens.size() == MANY) {
        place[expert] = works.size();
        works.push_back(
            {in + row * d, in + (row + f) * d, out + expert * d * f, from_row(in_scales, row),
             from_row(in_scales, row + f), from_row(out_scales, expert * d)});
      }
      works[place[expert]].tokens.push_back(i / chosen.size(1));
      works[place[expert]].shares.push_back(share_of[i]);
    }
    y = sum_of(std::move(works), x, f);
  });
  return y;
}

// SwiGLU of a layer: x [m d], gate [f d], up [f d], down [d f], and for int8 weights a scale per row: [m d]
at::Tensor mlp(
    const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up, const at::Tensor& down,
    const std::optional<at::Tensor>& gate_scales, const std::optional<at::Tensor>& up_scales,
    const std::optional<at::Tensor>& down_scales) {
  const int64_t m = x.size(0), d = down.size(0), f = down.size(1);
  check_product(x, gate, gate.size(1));
  check_product(x, up, up.size(1));
  check_product(x, down, d);
  at::Tensor y;
  with_weight(gate, [&](auto* in) {
    using T = std::remove_pointer_t<decltype(in)>;
    TORCH_CHECK_VALUE(up.sizes() == gate.sizes() && gate.size(0) == f, "expected gate and up of [", f, ", ", d, "].");
    TORCH_CHECK_VALUE(
        up.scalar_type() == gate.scalar_type() && down.scalar_type() == gate.scalar_type(), "expected one dtype.");
    std::vector<Work<T>> works;
    for (int64_t first = 0; first < m; first += MANY) {
      const int64_t count = std::min(MANY, m - first);
      works.push_back(
          {in, static_cast<const T*>(up.const_data_ptr()), static_cast<const T*>(down.const_data_ptr()),
           scales_of(gate_scales), scales_of(up_scales), scales_of(down_scales), std::vector<int64_t>(count),
           std::vector<float>(count, 1.0f)});
      std::iota(works.back().tokens.begin(), works.back().tokens.end(), first);
    }
    y = sum_of(std::move(works), x, f);
  });
  return y;
}

}  // namespace latent

TORCH_LIBRARY_FRAGMENT(deepseek_latent, library) {
  library.def(
      "experts(Tensor x, Tensor gate_up, Tensor down, Tensor chosen, Tensor shares, Tensor? gate_up_scales=None, "
      "Tensor? down_scales=None) -> Tensor");
  library.def(
      "mlp(Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? gate_scales=None, Tensor? up_scales=None, "
      "Tensor? down_scales=None) -> Tensor");
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) {
  library.impl("experts", latent::experts);
  library.impl("mlp", latent::mlp);
}
