// Products of tokens with some rows of a weight in bfloat16, int8 or float32, read where they lie and summed in float32.
//
// Letters: m tokens, n rows of a weight, k their width. Few tokens go row by row as dot products, at the speed at which
// memory gives the weights; many have their tokens in the lanes of vectors, so that a row is widened once for all of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <initializer_list>
#include <optional>
#include <type_traits>
#include <vector>

#include "share.h"
#include "vectors.h"

namespace latent {

constexpr int64_t ROWS = 64;       // rows of a weight that meet many tokens
constexpr int64_t SOME_ROWS = 16;  // that a thread takes at least
constexpr int64_t FEW = 8;         // tokens up to which rows become dot products
constexpr int64_t MANY = 256;      // tokens that are multiplied at once: their inputs stay in the second cache
constexpr int64_t GROUP = 2 * LANES;  // tokens that share the lanes of one step
constexpr int64_t AHEAD = 2048;    // bytes from what is read to what is asked for
constexpr int64_t DEPTH = 256;     // of a product with lanes: a group's inputs then stay in the first cache

// Rows that meet m tokens at once, in a buffer of ROWS * MANY sums: many if tokens are few, since every stream of memory
// starts slowly.
inline int64_t rows_at_once(int64_t m) { return m <= FEW ? ROWS * MANY / FEW / 2 : ROWS; }

// At most MANY tokens as products read them: few one after the other, padded with zeros to whole vectors; many side by
// side, in groups of 32 of which each is [k 32]. For weights in bfloat16, 32 elements of few tokens are the 16 even ones,
// then the 16 odd ones, since a weight's upper and lower halves of words are widened by one instruction each.
struct Inputs {
  int64_t m, k, padded, whole_pairs;
  Aligned data;

  Inputs(int64_t m, int64_t k, bool for_bfloat16)
      : m(m), k(k), padded(ceil_div(k, LANES) * LANES),
        whole_pairs(for_bfloat16 && is_few() ? k / (2 * LANES) * (2 * LANES) : 0),
        data(is_few() ? m * padded : ceil_div(m, GROUP) * GROUP * k) {}
  bool is_few() const { return m <= FEW; }
  const float* token(int64_t i) const { return data.data() + i * padded; }
  const float* group(int64_t g) const { return data.data() + g * k * GROUP; }
  float& at(int64_t token, int64_t i) {
    if (!is_few()) return data.data()[(token / GROUP * k + i) * GROUP + token % GROUP];
    const int64_t within = i % (2 * LANES);
    return data.data()[token * padded + (i < whole_pairs ? i - within + within % 2 * LANES + within / 2 : i)];
  }
  // where from(token) is the start of one
  template <class From>
  void put(From from) {
    if (is_few()) {
      for (int64_t token = 0; token < m; token++) put_one(from(token), token);
      return;
    }
    // a few columns of all, then the next
    for (int64_t start = 0; start < k; start += LANES)
      for (int64_t token = 0; token < m; token++)
        for (int64_t i = start; i < std::min(start + LANES, k); i++)
          at(token, i) = static_cast<float>(from(token)[i]);
  }
  template <class T>
  void put_one(const T* x, int64_t token) {
    float* const to = data.data() + token * padded;
    if (!whole_pairs) return widen_row(x, k, to);
    int64_t i = 0;
    if constexpr (std::is_same_v<T, c10::BFloat16>)
      for (; i < whole_pairs; i += 2 * LANES) {
        const Pairs pairs = widen_pairs(x + i);
        store(to + i, pairs.even);
        store(to + i + LANES, pairs.odd);
      }
    for (; i < k; i++) at(token, i) = static_cast<float>(x[i]);
  }
};

// R rows, `step` apart, times M tokens: to[r * to_step + token]
template <class T, int R, int M>
inline void dot_rows(const T* rows, int64_t step, const Inputs& x, int64_t first, float* to, int64_t to_step) {
  constexpr int64_t LINE = 64 / sizeof(T);
  constexpr bool PAIRS = std::is_same_v<T, c10::BFloat16>;
  Floats sums[R][M] = {};
  const auto add = [&](int r, int64_t i, Floats row) {
    for (int m = 0; m < M; m++) sums[r][m] += row * load<Floats>(x.token(first + m) + i);
  };
  int64_t i = 0;
  for (; i + LINE <= x.k; i += LINE)
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(reinterpret_cast<const char*>(rows + r * step + i) + AHEAD);
      if constexpr (PAIRS) {
        const Pairs pairs = widen_pairs(rows + r * step + i);
        add(r, i, pairs.even);
        add(r, i + LANES, pairs.odd);
      } else {
        for (int64_t j = i; j < i + LINE; j += LANES) add(r, j, widen(rows + r * step + j));
      }
    }
  for (; i + LANES <= x.k; i += LANES)
    for (int r = 0; r < R; r++) add(r, i, widen(rows + r * step + i));
  if (i < x.k)
    for (int r = 0; r < R; r++) add(r, i, widen_some(rows + r * step + i, x.k - i));
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

// n <= rows_at_once(x.m) rows of width x.k, `step` apart, times all tokens: to[row][token]
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

inline bool is_bfloat16(const at::Tensor& x) { return x.scalar_type() == at::kBFloat16; }

// calls body with the data of a tensor whose dtype is known when it runs
template <class Body>
void with_floats(const at::Tensor& x, Body body) {
  if (is_bfloat16(x)) return body(static_cast<c10::BFloat16*>(x.data_ptr()));
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, "expected bfloat16 or float32, got ", x.scalar_type(), ".");
  body(static_cast<float*>(x.data_ptr()));
}

template <class Body>
void with_weight(const at::Tensor& weight, Body body) {
  if (weight.scalar_type() == at::kChar) return body(static_cast<int8_t*>(weight.data_ptr()));
  with_floats(weight, body);
}

// the scales of int8 weights, one per row; other weights have none, and no row is scaled
inline const float* scales_of(const std::optional<at::Tensor>& scales) {
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

// a weight [n k] with the scales of int8 rows or null, the tokens it meets, and where [m n] goes
template <class T, class Y>
struct Product {
  const T* weight;
  const float* scales;
  int64_t n;
  const Inputs* x;
  Y* to;
};

// tokens times one weight after the other, in one pass
template <class T, class Y>
void multiply_all(const std::vector<Product<T, Y>>& products) {
  int64_t units = 0, most = rows_at_once(1) / SOME_ROWS;
  for (const auto& product : products) {
    units += ceil_div(product.n, SOME_ROWS);
    most = std::min(most, rows_at_once(product.x->m) / SOME_ROWS);
  }
  share(units, 1, most, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[ROWS * MANY];
    for (const auto& [weight, scales, n, x, to] : products) {
      const int64_t first = begin * SOME_ROWS, last = std::min(end * SOME_ROWS, n);
      if (first < last) {
        multiply(weight + first * x->k, last - first, x->k, *x, sums);
        write_rows(sums, last - first, x->m, scales, to, n, first);
      }
      // counted from the start of the next
      begin = std::max<int64_t>(begin - ceil_div(n, SOME_ROWS), 0), end -= ceil_div(n, SOME_ROWS);
    }
  });
}

inline void check_product(const at::Tensor& x, const at::Tensor& weight, int64_t k) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.stride(1) == 1 && x.size(1) == k, "expected tokens [m ", k, "], got ", x.sizes(), ".");
  TORCH_CHECK_VALUE(weight.is_contiguous(), "expected a weight whose rows follow each other, got ", weight.strides());
}

}  // namespace latent
