// SwiGLU, down(act(gate x) * up x), of one layer or of the chosen experts, with all weights in two passes.
//
// Letters: m tokens, e experts, d model width, f inner width of one expert or of what all tokens share.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "products.h"

namespace latent {

// One SwiGLU of at most MAX_TOKENS tokens: its weights, which tokens it is for, and how much its result weighs for each.
template <class R>
struct Work {
  int64_t f;
  R gate, up, down;  // [f d], [f d], [d f]
  std::vector<int64_t> tokens = {};
  std::vector<float> shares = {};
  std::vector<Inputs> steps = {};  // the tokens, then act(gate x) * up x
};

// the index of the work that a block belongs to; first[i] is the first block of work i
inline int64_t work_of(int64_t block, const std::vector<int64_t>& first) {
  return std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1;
}

// x [m d] in bfloat16 or float32; y [m d] in the same dtype becomes the sum over all works
template <class R>
void sum_of(std::vector<Work<R>> works, const at::Tensor& x, const at::Tensor& y) {
  const int64_t m = x.size(0), d = x.size(1);
  share(works.size(), 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const int64_t count = works[i].tokens.size();
      works[i].steps = {Inputs(count, d, R::is_bfloat16), Inputs(count, works[i].f, R::is_bfloat16)};
      with_floats(x, [&](auto* data) {
        works[i].steps[0].put([&](int64_t t) { return data + works[i].tokens[t] * x.stride(0); });
      });
    }
  });

  std::vector<int64_t> blocks{0};
  for (const Work<R>& work : works) blocks.push_back(blocks.back() + ceil_div(work.f, ROW_BLOCK));
  const int64_t most = rows_at_once(m) / ROW_BLOCK;
  // with many tokens, a short range would read all their inputs for a few rows
  const int64_t least = m <= MAX_DOT_TOKENS ? 1 : most;
  share(blocks.back(), least, most, [&](int64_t begin, int64_t end) {
    alignas(64) float gates[TILE_ROWS * MAX_TOKENS], ups[TILE_ROWS * MAX_TOKENS];
    // the range may end in a later work
    for (int64_t block = begin, until; block < end; block = until) {
      const int64_t i = work_of(block, blocks);
      Work<R>& work = works[i];
      until = std::min(end, blocks[i + 1]);
      const int64_t first = (block - blocks[i]) * ROW_BLOCK;
      const int64_t count = std::min(first + (until - block) * ROW_BLOCK, work.f) - first;
      const Inputs& tokens = work.steps[0];
      multiply(work.gate.from(first), count, tokens, gates);
      multiply(work.up.from(first), count, tokens, ups);
      for (int64_t r = 0; r < count; r++) {
        const float gate_scale = work.gate.scale(first + r), up_scale = work.up.scale(first + r);
        for (int64_t i = r * tokens.m; i < (r + 1) * tokens.m; i++) gates[i] *= gate_scale, ups[i] *= up_scale;
      }
      // a few elements behind the last one are computed and not used
      for (int64_t i = 0; i < count * tokens.m; i += LANES) {
        const Floats gate = load<Floats>(gates + i), power = exp_of_negative(gate < 0.0f ? gate : -gate);
        const Floats sigmoid = (gate < 0.0f ? power : splat(1.0f)) / (1.0f + power);
        store(gates + i, gate * sigmoid * load<Floats>(ups + i));
      }
      for (int64_t r = 0; r < count; r++)
        for (int64_t t = 0; t < tokens.m; t++) work.steps[1].at(t, first + r) = gates[r * tokens.m + t];
    }
  });

  share(ceil_div(d, ROW_BLOCK), 2 * least, 2 * most, [&](int64_t begin, int64_t end) {
    const int64_t first_column = begin * ROW_BLOCK, columns = std::min(end * ROW_BLOCK, d) - first_column;
    alignas(64) float sums[TILE_ROWS * MAX_TOKENS];
    std::vector<float> total(m * columns);
    // a work's inputs stay in the cache while all its rows pass
    for (const Work<R>& work : works) {
      const Inputs& tokens = work.steps[1];
      const int64_t at_once = rows_at_once(tokens.m);
      for (int64_t first = 0; first < columns; first += at_once) {
        const int64_t row = first_column + first, count = std::min(at_once, columns - first);
        const R rows = work.down.from(row);
        multiply(rows, count, tokens, sums);
        for (int64_t t = 0; t < tokens.m; t++)
          for (int64_t r = 0; r < count; r++)
            total[work.tokens[t] * columns + first + r] +=
                work.shares[t] * sums[r * tokens.m + t] * rows.scale(r);
      }
    }
    with_floats(y, [&](auto* to) {
      using Result = std::remove_pointer_t<decltype(to)>;
      for (int64_t i = 0; i < m; i++)
        for (int64_t c = 0; c < columns; c++)
          to[i * d + first_column + c] = static_cast<Result>(total[i * columns + c]);
    });
  });
}

// adds the chosen experts: rows of gate_up [e 2f d] and down [e d f], chosen [m k] int64, shares [m k] float32
template <class R>
void add_experts(
    std::vector<Work<R>>& works, const R& gate_up, const R& down, at::IntArrayRef down_sizes, const at::Tensor& chosen,
    const at::Tensor& shares) {
  const int64_t num_experts = down_sizes[0], d = down_sizes[1], f = down_sizes[2];
  const at::Tensor in_order = chosen.contiguous(), shares_in_order = shares.contiguous();
  const int64_t* expert_of = in_order.const_data_ptr<int64_t>();
  const float* share_of = shares_in_order.const_data_ptr<float>();
  std::vector<int64_t> place(num_experts, -1);
  for (int64_t i = 0; i < chosen.numel(); i++) {
    const int64_t expert = expert_of[i], row = expert * 2 * f, token = i / chosen.size(1);
    TORCH_CHECK_VALUE(expert >= 0, "expected chosen experts of at least 0, got ", expert, " for token ", token, ".");
    // expert parallelism marks the choices of other ranks by an index past the last expert
    if (expert >= num_experts) continue;
    // a token that chooses an expert twice is multiplied once: a work has no more tokens than x
    if (place[expert] >= 0 && works[place[expert]].tokens.back() == token) {
      works[place[expert]].shares.back() += share_of[i];
      continue;
    }
    if (place[expert] < 0 || works[place[expert]].tokens.size() == MAX_TOKENS) {
      place[expert] = works.size();
      works.push_back({f, gate_up.from(row), gate_up.from(row + f), down.from(expert * d)});
    }
    works[place[expert]].tokens.push_back(token);
    works[place[expert]].shares.push_back(share_of[i]);
  }
}

// adds a SwiGLU that all m tokens pass: rows of gate [f d], up [f d] and down [d f]
template <class R>
void add_mlp(std::vector<Work<R>>& works, int64_t m, const R& gate, const R& up, const R& down, int64_t f) {
  for (int64_t first = 0; first < m; first += MAX_TOKENS) {
    const int64_t count = std::min(MAX_TOKENS, m - first);
    works.push_back({f, gate, up, down, std::vector<int64_t>(count), std::vector<float>(count, 1.0f)});
    std::iota(works.back().tokens.begin(), works.back().tokens.end(), first);
  }
}

// the scales of weight i; `scales` is empty or has one tensor for each of `count` weights
const at::Tensor* scales_of(at::TensorList scales, size_t i, size_t count) {
  TORCH_CHECK_VALUE(
      scales.empty() || scales.size() == count, "expected scales for each of ", count, " weights, got ", scales.size(), ".");
  return scales.empty() ? nullptr : &scales[i];
}

// gate, up and down of a SwiGLU of width d with their scales
std::vector<Weight> weights_of_mlp(int64_t d, at::TensorList weights, at::TensorList scales) {
  TORCH_CHECK_VALUE(weights.size() == 3, "expected gate, up and down, got ", weights.size(), " weights.");
  const Weight gate = weight_of(weights[0], scales_of(scales, 0, 3), "gate [f d]", {ANY, d});
  const int64_t f = weights[0].size(0);
  return {
      gate, weight_of(weights[1], scales_of(scales, 1, 3), "up [f d]", {f, d}),
      weight_of(weights[2], scales_of(scales, 2, 3), "down [d f]", {d, f})};
}

// SwiGLU of a layer: x [m d], weights gate [f d], up [f d] and down [d f], for int8 codes with scales as for `linear`: [m d]
// in the dtype of x
at::Tensor mlp(const at::Tensor& x, at::TensorList weights, at::TensorList scales) {
  check_tokens(x, ANY);
  const std::vector<Weight> all = weights_of_mlp(x.size(1), weights, scales);
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  with_rows(all, [&](auto rows_of) {
    std::vector<Work<decltype(rows_of(all[0]))>> works;
    add_mlp(works, x.size(0), rows_of(all[0]), rows_of(all[1]), rows_of(all[2]), weights[2].size(1));
    sum_of(std::move(works), x, y);
  });
  return y;
}

// SwiGLU of the chosen experts: x [m d], gate_up [e 2f d], down [e d f], chosen [m k] int64, shares [m k] float32, for int8
// codes with scales [.. rows] or [.. rows groups]; if weights of shared experts follow, as for `mlp`, their result is added
// in the same passes: [m d] in the dtype of x
at::Tensor experts(
    const at::Tensor& x, const at::Tensor& gate_up, const at::Tensor& down, const at::Tensor& chosen,
    const at::Tensor& shares, at::TensorList scales, at::TensorList shared, at::TensorList shared_scales) {
  check_tokens(x, ANY);
  const int64_t m = x.size(0), d = x.size(1);
  const Weight down_weight = weight_of(down, scales_of(scales, 1, 2), "down [e d f]", {ANY, d, ANY});
  const int64_t e = down.size(0), f = down.size(2);
  std::vector<Weight> all{weight_of(gate_up, scales_of(scales, 0, 2), "gate_up [e 2f d]", {e, 2 * f, d}), down_weight};
  if (!shared.empty() || !shared_scales.empty())
    for (const Weight& weight : weights_of_mlp(d, shared, shared_scales)) all.push_back(weight);
  check(chosen, "chosen [m k]", {m, ANY}, {at::kLong});
  check(shares, "shares [m k]", chosen.sizes(), {at::kFloat});
  at::Tensor y = at::empty(x.sizes(), x.options());
  if (y.numel() == 0) return y;
  with_rows(all, [&](auto rows_of) {
    std::vector<Work<decltype(rows_of(all[0]))>> works;
    // the widest first, so that short ranges are left for the end
    if (!shared.empty())
      add_mlp(works, x.size(0), rows_of(all[2]), rows_of(all[3]), rows_of(all[4]), shared[2].size(1));
    add_experts(works, rows_of(all[0]), rows_of(all[1]), down.sizes(), chosen, shares);
    sum_of(std::move(works), x, y);
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
