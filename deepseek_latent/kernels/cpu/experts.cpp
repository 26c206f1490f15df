// SwiGLU, down(act(gate x) * up x), of one layer or of the chosen experts, all weights in two passes.
//
// Letters: m tokens, e experts, d model width, f inner width of one expert or of what all tokens share.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "products.h"

namespace latent {

// What one SwiGLU has to do for at most MANY tokens: its weights with the scales of int8 ones, which tokens, how much of
// each, and what it knows of them on the way.
template <class T>
struct Work {
  int64_t f;
  const T *gate, *up, *down;                              // [f d], [f d], [d f]
  const float *gate_scales, *up_scales, *down_scales;     // [f], [f], [d], or null
  std::vector<int64_t> tokens = {};
  std::vector<float> shares = {};
  std::vector<Inputs> steps = {};  // the tokens, then act(gate x) * up x
};

inline const float* from_row(const float* scales, int64_t row) { return scales ? scales + row : nullptr; }

// which of a few works holds a block, where first[i] is the first of work i
inline int64_t work_of(int64_t block, const std::vector<int64_t>& first) {
  return std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1;
}

// x [m d] in bfloat16 or float32: the sum over all works [m d] in the same dtype
template <class T>
at::Tensor sum_of(std::vector<Work<T>> works, const at::Tensor& x) {
  constexpr bool is_paired = std::is_same_v<T, c10::BFloat16>;
  const int64_t m = x.size(0), d = x.size(1);
  share(works.size(), 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t count = works[i].tokens.size();
      works[i].steps = {Inputs(count, d, is_paired), Inputs(count, works[i].f, is_paired)};
      with_floats(x, [&](auto* data) {
        works[i].steps[0].put([&](int64_t t) { return data + works[i].tokens[t] * x.stride(0); });
      });
    }
  });

  std::vector<int64_t> blocks{0};
  for (const Work<T>& work : works) blocks.push_back(blocks.back() + ceil_div(work.f, SOME_ROWS));
  const int64_t most = rows_at_once(m) / SOME_ROWS;
  // with many tokens a short piece would read all their inputs for a few rows
  const int64_t least = m <= FEW ? 1 : most;
  share(blocks.back(), least, most, [&](int64_t begin, int64_t end) {
    alignas(64) float gates[ROWS * MANY], ups[ROWS * MANY];
    // what was handed out may end in the next work
    for (int64_t block = begin, until; block < end; block = until) {
      const int64_t i = work_of(block, blocks);
      Work<T>& work = works[i];
      until = std::min(end, blocks[i + 1]);
      const int64_t first = (block - blocks[i]) * SOME_ROWS;
      const int64_t count = std::min(first + (until - block) * SOME_ROWS, work.f) - first;
      const Inputs& tokens = work.steps[0];
      multiply(work.gate + first * d, count, d, tokens, gates);
      multiply(work.up + first * d, count, d, tokens, ups);
      for (int64_t r = 0; r < count; r++)
        for (int64_t i = r * tokens.m; i < (r + 1) * tokens.m; i++) {
          gates[i] *= scale(work.gate_scales, first + r);
          ups[i] *= scale(work.up_scales, first + r);
        }
      // a few behind the last are computed with and not used
      for (int64_t i = 0; i < count * tokens.m; i += LANES) {
        const Floats gate = load<Floats>(gates + i), power = exp_of_negative(gate < 0.0f ? gate : -gate);
        const Floats sigmoid = (gate < 0.0f ? power : splat(1.0f)) / (1.0f + power);
        store(gates + i, gate * sigmoid * load<Floats>(ups + i));
      }
      for (int64_t r = 0; r < count; r++)
        for (int64_t t = 0; t < tokens.m; t++) work.steps[1].at(t, first + r) = gates[r * tokens.m + t];
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
        multiply(work.down + row * work.f, count, work.f, tokens, sums);
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

// adds the chosen experts: gate_up [e 2f d], down [e d f], chosen [m k] int64, shares [m k] float32, and for int8 weights two
// scales per row [e 2f], [e d]
template <class T>
void add_experts(
    std::vector<Work<T>>& works, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& chosen,
    const at::Tensor& shares, at::TensorList scales) {
  const int64_t num_experts = down.size(0), d = down.size(1), f = down.size(2);
  const at::Tensor in_order = chosen.contiguous(), shares_in_order = shares.contiguous();
  const int64_t* expert_of = in_order.const_data_ptr<int64_t>();
  const float* share_of = shares_in_order.const_data_ptr<float>();
  const T *in = static_cast<const T*>(gate_up.const_data_ptr()), *out = static_cast<const T*>(down.const_data_ptr());
  const float* in_scales = scales.empty() ? nullptr : scales[0].const_data_ptr<float>();
  const float* out_scales = scales.empty() ? nullptr : scales[1].const_data_ptr<float>();
  std::vector<int64_t> place(num_experts, -1);
  for (int64_t i = 0; i < chosen.numel(); i++) {
    const int64_t expert = expert_of[i], row = expert * 2 * f;
    // expert parallelism marks the choices of other ranks by an index past the last expert
    if (expert >= num_experts) continue;
    if (place[expert] < 0 || works[place[expert]].tokens.size() == MANY) {
      place[expert] = works.size();
      works.push_back(
          {f, in + row * d, in + (row + f) * d, out + expert * d * f, from_row(in_scales, row),
           from_row(in_scales, row + f), from_row(out_scales, expert * d)});
    }
    works[place[expert]].tokens.push_back(i / chosen.size(1));
    works[place[expert]].shares.push_back(share_of[i]);
  }
}

// adds a SwiGLU that all m tokens pass: weights gate [f d], up [f d], down [d f], and for int8 ones three scales per row
template <class T>
void add_mlp(std::vector<Work<T>>& works, int64_t m, at::TensorList weights, at::TensorList scales) {
  const int64_t f = weights[2].size(1);
  const auto data = [&](int64_t i) { return static_cast<const T*>(weights[i].const_data_ptr()); };
  const auto factors = [&](int64_t i) { return scales.empty() ? nullptr : scales[i].const_data_ptr<float>(); };
  for (int64_t first = 0; first < m; first += MANY) {
    const int64_t count = std::min(MANY, m - first);
    works.push_back(
        {f, data(0), data(1), data(2), factors(0), factors(1), factors(2), std::vector<int64_t>(count),
         std::vector<float>(count, 1.0f)});
    std::iota(works.back().tokens.begin(), works.back().tokens.end(), first);
  }
}

void check_mlp(const at::Tensor& x, at::TensorList weights, at::TensorList scales) {
  TORCH_CHECK_VALUE(weights.size() == 3 && (scales.empty() || scales.size() == 3), "expected gate, up and down.");
  const at::Tensor &gate = weights[0], &up = weights[1], &down = weights[2];
  for (const at::Tensor& weight : {gate, up}) check_product(x, weight, weight.size(1));
  check_product(x, down, down.size(0));
  TORCH_CHECK_VALUE(
      up.sizes() == gate.sizes() && gate.size(0) == down.size(1) && up.scalar_type() == gate.scalar_type() &&
          down.scalar_type() == gate.scalar_type() && (scales.empty() == (gate.scalar_type() != at::kChar)),
      "expected gate and up [f d], down [d f] of one dtype, with scales where it is int8.");
}

// SwiGLU of a layer: x [m d], weights as for `add_mlp`: [m d] in the dtype of x
at::Tensor mlp(const at::Tensor& x, at::TensorList weights, at::TensorList scales) {
  check_mlp(x, weights, scales);
  at::Tensor y;
  with_weight(weights[0], [&](auto* gate) {
    std::vector<Work<std::remove_pointer_t<decltype(gate)>>> works;
    add_mlp(works, x.size(0), weights, scales);
    y = sum_of(std::move(works), x);
  });
  return y;
}

// SwiGLU of the chosen experts: x [m d], the rest as for `add_experts`; where weights of shared experts follow, as for
// `add_mlp`, they are added in the same passes: [m d] in the dtype of x
at::Tensor experts(
    const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& chosen,
    const at::Tensor& shares, at::TensorList scales, at::TensorList shared, at::TensorList shared_scales) {
  check_product(x, gate_up, gate_up.size(2));
  check_product(x, down, down.size(1));
  TORCH_CHECK_VALUE(scales.size() == (gate_up.scalar_type() == at::kChar ? 2 : 0), "expected scales for int8 weights.");
  TORCH_CHECK_VALUE(
      down.scalar_type() == gate_up.scalar_type() && gate_up.size(1) == 2 * down.size(2) &&
          gate_up.size(0) == down.size(0) && chosen.sizes() == shares.sizes() && chosen.size(0) == x.size(0),
      "expected both weights of one dtype and as many experts, and chosen ones with their shares for every token.");
  if (!shared.empty()) {
    check_mlp(x, shared, shared_scales);
    TORCH_CHECK_VALUE(shared[0].scalar_type() == gate_up.scalar_type(), "expected shared experts of the same dtype.");
  }
  at::Tensor y;
  with_weight(gate_up, [&](auto* in) {
    std::vector<Work<std::remove_pointer_t<decltype(in)>>> works;
    // the widest first, so that what is handed out ends with short pieces
    if (!shared.empty()) add_mlp(works, x.size(0), shared, shared_scales);
    add_experts(works, gate_up, down, chosen, shares, scales);
    y = sum_of(std::move(works), x);
  });
  return y;
}

}  // namespace latent

TORCH_LIBRARY_FRAGMENT(deepseek_latent, library) {
  library.def(
      "experts(Tensor x, Tensor gate_up, Tensor down, Tensor chosen, Tensor shares, Tensor[] scales, Tensor[] shared, "
      "Tensor[] shared_scales) -> Tensor");
  library.def("mlp(Tensor x, Tensor[] weights, Tensor[] scales) -> Tensor");
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) {
  library.impl("experts", latent::experts);
  library.impl("mlp", latent::mlp);
}
