// Products of tokens with rows of a weight in bfloat16, int8 or float32, read where they are stored, summed in float32.
//
// Letters: m tokens, n rows of a weight, k their width. Few tokens are multiplied row by row as dot products, at the speed at
// which memory gives the weights. Many tokens lie in the lanes of vectors, so that a row is widened once for all of them.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "rows.h"
#include "share.h"

namespace latent {

constexpr int64_t TILE_ROWS = 64;      // rows of a weight that many tokens are multiplied by at a time
constexpr int64_t ROW_BLOCK = 16;      // the unit in which rows are handed out to threads
constexpr int64_t MAX_DOT_TOKENS = 8;  // up to this many tokens, rows are dot products
constexpr int64_t MAX_TOKENS = 256;    // tokens multiplied at a time: their inputs stay in the second-level cache
constexpr int64_t LANE_TOKENS = 2 * LANES;  // tokens that share the lanes of one step
constexpr int64_t PREFETCH_BYTES = 2048;    // distance from what is read to what is prefetched
constexpr int64_t TILE_WIDTH = 256;         // columns of a tile: their inputs for LANE_TOKENS stay in the first-level cache

// Rows that m tokens are multiplied by at once, in a buffer of TILE_ROWS * MAX_TOKENS sums: many rows if there are few
// tokens, since every stream of memory starts slowly.
inline int64_t rows_at_once(int64_t m) {
  return m <= MAX_DOT_TOKENS ? TILE_ROWS * MAX_TOKENS / MAX_DOT_TOKENS / 2 : TILE_ROWS;
}

// At most MAX_TOKENS tokens in float32, in the order in which products read them. Few tokens follow one another, padded
// with zeros to whole vectors. Many lie side by side in groups of LANE_TOKENS, each group as [k LANE_TOKENS]. For weights in
// bfloat16, each 32 elements of few tokens are stored as the 16 even ones, then the 16 odd ones, since one instruction each
// widens the upper and the lower halves of a weight's words.
struct Inputs {
  int64_t m, k, padded, whole_pairs;
  Aligned data;

  Inputs(int64_t m, int64_t k, bool for_bfloat16)
      : m(m), k(k), padded(ceil_div(k, LANES) * LANES),
        whole_pairs(for_bfloat16 && is_few() ? k / (2 * LANES) * (2 * LANES) : 0),
        data(is_few() ? m * padded : ceil_div(m, LANE_TOKENS) * LANE_TOKENS * k) {}
  bool is_few() const { return m <= MAX_DOT_TOKENS; }
  const float* token(int64_t i) const { return data.data() + i * padded; }
  const float* group(int64_t g) const { return data.data() + g * k * LANE_TOKENS; }
  float& at(int64_t token, int64_t i) {
    if (!is_few()) return data.data()[(token / LANE_TOKENS * k + i) * LANE_TOKENS + token % LANE_TOKENS];
    const int64_t within = i % (2 * LANES);
    return data.data()[token * padded + (i < whole_pairs ? i - within + within % 2 * LANES + within / 2 : i)];
  }
  // fills in all tokens; from(token) is the address of a token's first element
  template <class From>
  void put(From from) {
    if (is_few()) {
      for (int64_t token = 0; token < m; token++) put_one(from(token), token);
      return;
    }
    // a few columns of all tokens, then the next columns
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

inline void prefetch(const void* from) { __builtin_prefetch(static_cast<const char*>(from) + PREFETCH_BYTES); }

// R rows that are `apart` rows apart, times M tokens: to[r * to_step + token]
template <int R, int M, class T>
inline void dot_rows(const Rows<T>& rows, int64_t apart, const Inputs& x, int64_t first, float* to, int64_t to_step) {
  constexpr int64_t LINE = 64 / sizeof(T);
  Floats sums[R][M] = {};
  const auto add = [&](int r, int64_t i, Floats row) {
    for (int m = 0; m < M; m++) sums[r][m] += row * load<Floats>(x.token(first + m) + i);
  };
  const T* const data = rows.data;
  const int64_t step = apart * rows.step;
  int64_t i = 0;
  for (; i + LINE <= x.k; i += LINE)
    for (int r = 0; r < R; r++) {
      prefetch(data + r * step + i);
      if constexpr (Rows<T>::is_bfloat16) {
        const Pairs pairs = widen_pairs(data + r * step + i);
        add(r, i, pairs.even);
        add(r, i + LANES, pairs.odd);
      } else {
        for (int64_t j = i; j < i + LINE; j += LANES) add(r, j, widen(data + r * step + j));
      }
    }
  for (; i + LANES <= x.k; i += LANES)
    for (int r = 0; r < R; r++) add(r, i, widen(data + r * step + i));
  if (i < x.k)
    for (int r = 0; r < R; r++) add(r, i, widen_some(data + r * step + i, x.k - i));
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) to[r * to_step + first + m] = sum(sums[r][m]);
}

// `dot_rows` for int8 codes, which are multiplied by the scales of their groups, of type S, as they are widened
template <int R, int M, class S>
inline void dot_grouped(
    const GroupedRows& rows, const S* scales, int64_t apart, const Inputs& x, int64_t first, float* to, int64_t to_step) {
  constexpr int64_t LINE = 64;
  Floats sums[R][M] = {};
  const int8_t* const data = rows.data;
  const int64_t step = apart * rows.step, scales_step = apart * rows.groups;
  for (int64_t group = 0, i = 0; group < rows.groups; group++) {
    const int64_t end = i + rows.width;
    Floats scale[R];
    for (int r = 0; r < R; r++) scale[r] = splat(static_cast<float>(scales[r * scales_step + group]));
    const auto add = [&](int r, int64_t i) {
      const Floats row = widen(data + r * step + i) * scale[r];
      for (int m = 0; m < M; m++) sums[r][m] += row * load<Floats>(x.token(first + m) + i);
    };
    for (; i + LINE <= end; i += LINE)
      for (int r = 0; r < R; r++) {
        prefetch(data + r * step + i);
        for (int64_t j = i; j < i + LINE; j += LANES) add(r, j);
      }
    for (; i < end; i += LANES)
      for (int r = 0; r < R; r++) add(r, i);
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) to[r * to_step + first + m] = sum(sums[r][m]);
}

template <int R, int M>
inline void dot_rows(const GroupedRows& rows, int64_t apart, const Inputs& x, int64_t first, float* to, int64_t to_step) {
  if (rows.has_whole_vectors()) {
    const void* const scales = rows.scales.data;
    if (rows.scales.is_bfloat16)
      return dot_grouped<R, M>(rows, static_cast<const c10::BFloat16*>(scales), apart, x, first, to, to_step);
    return dot_grouped<R, M>(rows, static_cast<const float*>(scales), apart, x, first, to, to_step);
  }
  Floats sums[R][M] = {};
  for (int64_t i = 0; i < x.k; i += LANES)
    for (int r = 0; r < R; r++) {
      const Floats row = rows.widen_some(r * apart, i, std::min(LANES, x.k - i));
      for (int m = 0; m < M; m++) sums[r][m] += row * load<Floats>(x.token(first + m) + i);
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) to[r * to_step + first + m] = sum(sums[r][m]);
}

template <int M, class R>
inline void dot_block(const R& rows, int64_t n, const Inputs& x, int64_t first, float* to) {
  // four rows, a quarter of all apart: four streams of memory, each of which continues with its next row
  const int64_t quarter = n / 4;
  for (int64_t r = 0; r < quarter; r++)
    dot_rows<4, M>(rows.from(r), quarter, x, first, to + r * x.m, quarter * x.m);
  for (int64_t r = 4 * quarter; r < n; r++) dot_rows<1, M>(rows.from(r), 1, x, first, to + r * x.m, x.m);
}

// n <= rows_at_once(x.m) rows of width x.k times all tokens, without the scales of whole rows: to[row][token]
template <class R>
void multiply(const R& rows, int64_t n, const Inputs& x, float* to) {
  if (x.is_few()) {
    int64_t first = 0;
    for (; first + 4 <= x.m; first += 4) dot_block<4>(rows, n, x, first, to);
    for (; first + 2 <= x.m; first += 2) dot_block<2>(rows, n, x, first, to);
    for (; first < x.m; first++) dot_block<1>(rows, n, x, first, to);
    return;
  }
  alignas(64) float tile[TILE_ROWS * TILE_WIDTH], sums[TILE_ROWS * MAX_TOKENS];
  const int64_t groups = ceil_div(x.m, LANE_TOKENS), lanes = groups * LANE_TOKENS;
  std::fill(sums, sums + n * lanes, 0.0f);
  for (int64_t start = 0; start < x.k; start += TILE_WIDTH) {
    const int64_t width = std::min(TILE_WIDTH, x.k - start);
    for (int64_t r = 0; r < n; r++) rows.widen(r, start, width, tile + r * TILE_WIDTH);
    for (int64_t g = 0; g < groups; g++) {
      const float* group = x.group(g) + start * LANE_TOKENS;
      for (int64_t r = 0; r < n; r += 8)
        // rows behind the last one are computed and not used
        multiply_lanes<8, 2>(
            tile + r * TILE_WIDTH, TILE_WIDTH, 1, width, group, LANE_TOKENS, sums + r * lanes + g * LANE_TOKENS, lanes);
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

// sums [n][tokens], times the scales of these rows, into y [tokens, y_width] from column `first` on
template <class R, class Y>
void write_rows(const float* sums, const R& rows, int64_t n, int64_t m, Y* y, int64_t y_width, int64_t first) {
  // a few tokens of all rows, then the next tokens: both sides stay in the first-level cache
  for (int64_t start = 0; start < m; start += LANES)
    for (int64_t r = 0; r < n; r++) {
      const float scale = rows.scale(r);
      for (int64_t i = start; i < std::min(start + LANES, m); i++)
        y[i * y_width + first + r] = static_cast<Y>(sums[r * m + i] * scale);
    }
}

// n rows of a weight, the tokens that are multiplied by them, and where the result [m n] goes, in rows of `width`
template <class R, class Y>
struct Product {
  R rows;
  int64_t n;
  const Inputs* x;
  Y* to;
  int64_t width = n;
};

// tokens times one weight after the other, in one pass
template <class R, class Y>
void multiply_all(const std::vector<Product<R, Y>>& products) {
  int64_t units = 0, most = rows_at_once(1) / ROW_BLOCK;
  for (const auto& product : products) {
    units += ceil_div(product.n, ROW_BLOCK);
    most = std::min(most, rows_at_once(product.x->m) / ROW_BLOCK);
  }
  share(units, 1, most, [&](int64_t begin, int64_t end) {
    alignas(64) float sums[TILE_ROWS * MAX_TOKENS];
    for (const auto& [rows, n, x, to, width] : products) {
      const int64_t first = begin * ROW_BLOCK, last = std::min(end * ROW_BLOCK, n);
      if (first < last) {
        const R some = rows.from(first);
        multiply(some, last - first, *x, sums);
        write_rows(sums, some, last - first, x->m, to, width, first);
      }
      // from here on, counted from the start of the next product
      begin = std::max<int64_t>(begin - ceil_div(n, ROW_BLOCK), 0), end -= ceil_div(n, ROW_BLOCK);
    }
  });
}

}  // namespace latent
