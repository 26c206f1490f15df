// The inner part of attention over a cache: sixteen rows attend to one tile of tokens.
//
// Letters: b batch, s query tokens, t cached tokens, h heads, c latent width, r rotary width, w = c + r, u channels at the end of
// a latent that are stored beside its rotary key, in bfloat16, while codes are stored of the others. A row is one head of
// one query token; all rows read the same latents. A tile of tokens is widened to float32 and used twice, for the scores and
// for the weighted sum, with a running softmax in between (Milakov and Gimelshein, arXiv:1805.02867).
#pragma once

#include <algorithm>
#include <vector>

#include "cached_rows.h"
#include "vectors.h"

namespace latent {

constexpr int64_t TILE = 48;  // cached tokens of a tile, a multiple of SCORED_TOKENS
// Blocks that keep 24 sums in registers, so that ten loads serve 24 products. A block of scores has few rows, because queries
// come from the second-level cache; a block of weighted sums has many, because there the tokens do.
constexpr int64_t SCORED_TOKENS = 6, SCORED_ROWS = 4;
constexpr int64_t WEIGHTED_VECTORS = 3, WEIGHTED_ROWS = 8;  // vectors of a token, rows

// Consecutive tokens of all sequences, which share them if the step of a sequence is 0. Steps are in bytes.
struct Segment {
  const char *latent, *rotary;
  int64_t latent_step, rotary_step, latent_sequence, rotary_sequence;
  int64_t first, end;
};

struct Problem {
  int64_t batch, queries, heads, rows, padded_rows, tokens, c, r, u;
  const float* mask;  // added to scores, [b or 1, 1 or h, s, t] by its steps; null means that attention is causal
  int64_t mask_steps[4];
  std::vector<Segment> segments;
  // [h][blocks of WEIGHTED_VECTORS]: whether the weighted sums of these columns are read; empty means that all are
  std::vector<uint8_t> is_read = {};

  // whether any of WEIGHTED_ROWS rows needs the weighted sums of the block at column i
  bool reads(int64_t first_row, int64_t i) const {
    if (is_read.empty()) return true;
    const int64_t blocks = is_read.size() / heads, last = std::min(first_row + WEIGHTED_ROWS, rows);
    for (int64_t row = first_row; row < last; row++)
      if (is_read[row % heads * blocks + i / (WEIGHTED_VECTORS * LANES)]) return true;
    return false;
  }

  // in whole vectors
  int64_t width() const { return ceil_div(c + r, LANES) * LANES; }
  int64_t latent_width() const { return ceil_div(c, LANES) * LANES; }
};

// The result over a part of the tokens: per row the largest score, and the sum of weights and the weighted sum of latents, both
// relative to exp(largest).
struct Part {
  Aligned largest, total, context;  // [rows], [rows], [rows][latent_width]

  explicit Part(const Problem& p)
      : largest(p.padded_rows), total(p.padded_rows), context(p.padded_rows * p.latent_width()) {
    std::fill_n(largest.data(), p.padded_rows, LOWEST);
  }
};

// Addresses of at most TILE tokens.
struct Tokens {
  int64_t count = 0;
  const char *latent[TILE], *rotary[TILE];

  Tokens(const Problem& p, int64_t sequence, int64_t first, int64_t last) {
    for (const Segment& s : p.segments)
      for (int64_t token = std::max(first, s.first); token < std::min({first + TILE, last, s.end}); token++) {
        latent[count] = s.latent + sequence * s.latent_sequence + (token - s.first) * s.latent_step;
        rotary[count++] = s.rotary + sequence * s.rotary_sequence + (token - s.first) * s.rotary_step;
      }
  }
};

// Prefetches the next tokens, a little in every step, so that memory works while the CPU multiplies.
struct Prefetcher {
  const Tokens& tokens;
  int64_t bytes, per_step, done = 0;

  Prefetcher(const Tokens& tokens, int64_t bytes, int64_t steps)
      : tokens(tokens), bytes(bytes), per_step(ceil_div(ceil_div(bytes, 64), steps) * 64) {}
  void step(int64_t token) const {
    // into the second-level cache, because the first one holds what is being computed with
    if (token < tokens.count)
      for (int64_t i = done; i < std::min(done + per_step, bytes); i += 64)
        __builtin_prefetch(tokens.latent[token] + i, 0, 2);
  }
};

// sets scores [count][16] of sixteen rows to -inf where a row may not look
inline void apply_mask(const Problem& p, int64_t sequence, int64_t first_row, int64_t first, int64_t count, float* scores) {
  // only the last tokens can lie in the future of a query
  if (!p.mask && first + count <= p.tokens - p.queries + 1) return;
  for (int64_t i = 0; i < LANES && first_row + i < p.rows; i++) {
    const int64_t query = (first_row + i) / p.heads, head = (first_row + i) % p.heads;
    const float* mask =
        p.mask + sequence * p.mask_steps[0] + head * p.mask_steps[1] + query * p.mask_steps[2] + first * p.mask_steps[3];
    for (int64_t j = 0; j < count; j++) {
      if (p.mask)
        scores[j * LANES + i] += mask[j * p.mask_steps[3]];
      else if (first + j > p.tokens - p.queries + query)
        scores[j * LANES + i] = -INFINITE;
    }
  }
}

// Where queries are not zero: for each SCORED_ROWS rows, the columns, in whole vectors. In a model that was converted from
// grouped queries, a query is zero outside of the key of its group.
struct UsedColumns {
  std::vector<int64_t> columns, ends{0};

  // queries [rows][width]
  UsedColumns(const float* queries, int64_t rows, int64_t width) {
    columns.reserve(ceil_div(rows, SCORED_ROWS) * width / LANES);
    for (int64_t first = 0; first < rows; first += SCORED_ROWS) {
      for (int64_t i = 0; i < width; i += LANES) {
        Ints any{};
        for (int64_t row = first; row < first + SCORED_ROWS; row++)
          any |= load<Floats>(queries + row * width + i) != 0.0f;
        int32_t lanes[LANES], is_used = 0;
        store(lanes, any);
        for (const int32_t lane : lanes) is_used |= lane;
        if (is_used) columns.push_back(i);
      }
      ends.push_back(columns.size());
    }
  }
  const int64_t* begin(int64_t row) const { return columns.data() + ends[row / SCORED_ROWS]; }
  const int64_t* end(int64_t row) const { return columns.data() + ends[row / SCORED_ROWS + 1]; }
};

// scores [SCORED_TOKENS][16] of SCORED_ROWS queries and SCORED_TOKENS tokens of this width, over the given columns
inline void score(
    const float* queries, const float* tokens, int64_t width, const int64_t* column, const int64_t* end, float* scores) {
  Floats sums[SCORED_TOKENS][SCORED_ROWS] = {};
  for (; column < end; column++) {
    const int64_t i = *column;
    Floats query[SCORED_ROWS];
    for (int row = 0; row < SCORED_ROWS; row++) query[row] = load<Floats>(queries + row * width + i);
    for (int t = 0; t < SCORED_TOKENS; t++) {
      const Floats token = load<Floats>(tokens + t * width + i);
      for (int row = 0; row < SCORED_ROWS; row++) sums[t][row] += query[row] * token;
    }
  }
  for (int t = 0; t < SCORED_TOKENS; t += 2) {
    float totals[LANES];
    store(totals, sums_of_eight(sums[t]));
    for (int k = 0; k < 2; k++)
      std::memcpy(scores + (t + k) * LANES, totals + k * SCORED_ROWS, SCORED_ROWS * sizeof(float));
  }
}

// context [WEIGHTED_ROWS][context_width] += weights [count][16] times V vectors of each token
template <int V>
inline void add_weighted(
    const float* weights, const float* tokens, int64_t width, int64_t count, float* context, int64_t context_width,
    const Prefetcher& next) {
  Floats sums[WEIGHTED_ROWS][V];
  for (int row = 0; row < WEIGHTED_ROWS; row++)
    for (int v = 0; v < V; v++) sums[row][v] = load<Floats>(context + row * context_width + v * LANES);
  for (int64_t t = 0; t < count; t++) {
    next.step(t);
    Floats token[V];
    for (int v = 0; v < V; v++) token[v] = load<Floats>(tokens + t * width + v * LANES);
    for (int row = 0; row < WEIGHTED_ROWS; row++)
      for (int v = 0; v < V; v++) sums[row][v] += weights[t * LANES + row] * token[v];
  }
  for (int row = 0; row < WEIGHTED_ROWS; row++)
    for (int v = 0; v < V; v++) store(context + row * context_width + v * LANES, sums[row][v]);
}

// Sixteen rows attend to a tile of tokens, which the first sixteen rows widen into `tile`.
template <class Rows>
void attend_to_tile(
    const Problem& p, const Rows& rows, int64_t sequence, int64_t first_row, int64_t first, const Tokens& tokens,
    const Tokens& next, const float* queries, const UsedColumns& used, float* tile, Part& part) {
  alignas(64) float scores[TILE * LANES] = {};
  const int64_t width = p.width(), context_width = p.latent_width(), present = std::min(LANES, p.rows - first_row);
  // tokens and rows after the last one are computed and not used
  for (int64_t t = 0; t < tokens.count; t += SCORED_TOKENS) {
    for (int64_t k = t; first_row == 0 && k < std::min(t + SCORED_TOKENS, tokens.count); k++) {
      rows.read(tokens.latent[k], tile + k * width);
      widen_row(reinterpret_cast<const typename Rows::Rotary*>(tokens.rotary[k]), p.u + p.r, tile + k * width + p.c - p.u);
    }
    for (int64_t row = 0; row < present; row += SCORED_ROWS)
      score(
          queries + (first_row + row) * width, tile + t * width, width, used.begin(first_row + row),
          used.end(first_row + row), scores + t * LANES + row);
  }
  apply_mask(p, sequence, first_row, first, tokens.count, scores);

  float* const largest_before = part.largest.data() + first_row;
  Floats largest = load<Floats>(largest_before);
  for (int64_t t = 0; t < tokens.count; t++) largest = larger(load<Floats>(scores + t * LANES), largest);
  const Floats kept = exp_of_negative(load<Floats>(largest_before) - largest);
  store(largest_before, largest);

  Floats total = load<Floats>(part.total.data() + first_row) * kept;
  for (int64_t t = 0; t < tokens.count; t++) {
    const Floats weight = exp_of_negative(load<Floats>(scores + t * LANES) - largest);
    store(scores + t * LANES, weight);
    total += weight;
  }
  store(part.total.data() + first_row, total);

  float* const context = part.context.data() + first_row * context_width;
  if (sum(kept) < LANES)
    for (int64_t row = 0; row < LANES; row++)
      for (int64_t i = 0; i < context_width; i++) context[row * context_width + i] *= kept[row];
  const int64_t steps = ceil_div(context_width, WEIGHTED_VECTORS * LANES) * ceil_div(present, WEIGHTED_ROWS);
  Prefetcher prefetcher(next, first_row == 0 ? rows.bytes() + (p.u + p.r) * sizeof(typename Rows::Rotary) : 0, steps);
  for (int64_t i = 0; i < context_width; i += WEIGHTED_VECTORS * LANES)
    for (int64_t row = 0; row < present; row += WEIGHTED_ROWS) {
      float* to = context + row * context_width + i;
      const int64_t vectors = (context_width - i) / LANES;
      const auto add = vectors >= WEIGHTED_VECTORS ? add_weighted<WEIGHTED_VECTORS>
                       : vectors == 2              ? add_weighted<2>
                                                   : add_weighted<1>;
      if (p.reads(first_row + row, i))
        add(scores + row, tile + i, width, tokens.count, to, context_width, prefetcher);
      else
        for (int64_t t = 0; t < tokens.count; t++) prefetcher.step(t);
      prefetcher.done += prefetcher.per_step;
    }
}

}  // namespace latent
