// Attention of few queries over many cached latents, read once, where they lie.
//
// Letters: b batch, s query tokens, t cached tokens, h heads, c latent width, r rotary width, w = c + r. A lane is one
// head of one query token: all lanes read the same latents, so sixteen of them share a vector, a cached element is
// broadcast to them, and no sum ever runs across a vector. Tokens are widened to float32 a tile at a time and pass twice,
// for scores and for the weighted sum, with a running softmax in between (Milakov and Gimelshein, arXiv:1805.02867).

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <vector>

#include "cached_rows.h"
#include "share.h"
#include "vectors.h"

namespace latent {

constexpr int64_t TILE = 48;  // cached tokens widened at once
constexpr int64_t FEWEST = 10 * TILE;  // cached tokens worth a part of their own
constexpr int64_t PARTS = 4;  // per thread, so that none waits long for another

// Tokens one after the other, of all sequences or, where a sequence takes no step, common to them. Steps in bytes.
struct Stretch {
  const char *latent, *rotary;
  int64_t latent_step, rotary_step, latent_sequence, rotary_sequence;
  int64_t first, end;
};

struct Problem {
  int64_t batch, queries, heads, lanes, padded_lanes, tokens, c, r;
  const float* rows;  // [b s h w], scaled
  const float* mask;  // added to scores, [b or 1, 1 or h, s, t] by its steps, or null: the last query sees all
  int64_t mask_steps[4];
  std::vector<Stretch> stretches;

  int64_t width() const { return c + r; }
};

// What some tokens gave: per lane the largest score, and total and weighted sum in units of exp(that score).
struct Part {
  std::vector<float> largest, total, context;  // [lanes], [lanes], [lanes / 16][c][16]

  explicit Part(const Problem& p)
      : largest(p.padded_lanes, LOWEST), total(p.padded_lanes, 0.0f), context(p.padded_lanes * p.c, 0.0f) {}
};

// body(token, latent, rotary) for those of the tokens [first, first + count) that there are
template <class Body>
void for_tokens(const Problem& p, int64_t sequence, int64_t first, int64_t count, Body body) {
  for (const Stretch& s : p.stretches)
    for (int64_t token = std::max(first, s.first); token < std::min(first + count, s.end); token++)
      body(
          token, s.latent + sequence * s.latent_sequence + (token - s.first) * s.latent_step,
          s.rotary + sequence * s.rotary_sequence + (token - s.first) * s.rotary_step);
}

// asks for tokens that will be read soon, so that memory works while the CPU multiplies
template <class Rows>
void prefetch(const Problem& p, const Rows& rows, int64_t sequence, int64_t first, int64_t count) {
  for_tokens(p, sequence, first, count, [&](int64_t, const char* latent, const char* rotary) {
    // into an outer cache, since a tile's work comes first
    for (int64_t i = 0; i < rows.bytes(); i += 64) __builtin_prefetch(latent + i, 0, 1);
    for (int64_t i = 0; i < p.r * int64_t(sizeof(typename Rows::Rotary)); i += 64)
      __builtin_prefetch(rotary + i, 0, 1);
  });
}

// queries of sixteen lanes side by side: [lanes / 16][w][16]
std::vector<float> queries_in_lanes(const Problem& p, int64_t sequence) {
  std::vector<float> q(p.padded_lanes * p.width(), 0.0f);
  for (int64_t lane = 0; lane < p.lanes; lane++)
    for (int64_t i = 0; i < p.width(); i++)
      q[(lane / LANES * p.width() + i) * LANES + lane % LANES] = p.rows[(sequence * p.lanes + lane) * p.width() + i];
  return q;
}

// scores [count][16] of one group of lanes with -inf where a lane may not look
void hide(const Problem& p, int64_t sequence, int64_t group, int64_t first, int64_t count, float* scores) {
  // only the last tokens can lie in some query's future
  if (!p.mask && first + count <= p.tokens - p.queries + 1) return;
  for (int64_t i = 0; i < LANES && group * LANES + i < p.lanes; i++) {
    const int64_t query = (group * LANES + i) / p.heads, head = (group * LANES + i) % p.heads;
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

// tokens [first, first + count) of a tile, seen by one group of lanes
template <class Rows>
void attend_to_tile(
    const Problem& p, const Rows& rows, int64_t sequence, int64_t group, int64_t first, int64_t count,
    const float* tile, const float* q, Part& part) {
  alignas(64) float scores[TILE * LANES] = {};
  for (int64_t j = 0; j < count; j += 16)
    // tokens behind the last are computed with and not used
    multiply_lanes<16, 1>(
        tile + j * p.width(), p.width(), 1, p.width(), q + group * p.width() * LANES, LANES, scores + j * LANES, LANES);
  hide(p, sequence, group, first, count, scores);

  float* const largest_before = part.largest.data() + group * LANES;
  Floats largest = load<Floats>(largest_before);
  for (int64_t j = 0; j < count; j++) largest = larger(load<Floats>(scores + j * LANES), largest);
  const Floats kept = exp_of_negative(load<Floats>(largest_before) - largest);
  store(largest_before, largest);

  Floats total = load<Floats>(part.total.data() + group * LANES) * kept;
  for (int64_t j = 0; j < count; j++) {
    const Floats weight = exp_of_negative(load<Floats>(scores + j * LANES) - largest);
    store(scores + j * LANES, weight);
    total += weight;
  }
  store(part.total.data() + group * LANES, total);

  float* context = part.context.data() + group * p.c * LANES;
  if (sum(kept) < LANES)
    for (int64_t i = 0; i < p.c; i++) store(context + i * LANES, load<Floats>(context + i * LANES) * kept);
  const int64_t ahead = group ? 0 : ceil_div(TILE * 16, p.c);
  int64_t i = 0;
  for (; i + 16 <= p.c; i += 16) {
    prefetch(p, rows, sequence, first + TILE + i / 16 * ahead, ahead);
    multiply_lanes<16, 1>(tile + i, 1, p.width(), count, scores, LANES, context + i * LANES, LANES);
  }
  for (; i < p.c; i++) multiply_lanes<1, 1>(tile + i, 1, p.width(), count, scores, LANES, context + i * LANES, LANES);
}

// parts of one sequence as its result [s h c]
void merge(const Problem& p, const Part* parts, int64_t num_parts, float* to) {
  for (int64_t lane = 0; lane < p.lanes; lane++) {
    float largest = LOWEST, total = 0.0f;
    for (int64_t i = 0; i < num_parts; i++) largest = std::max(largest, parts[i].largest[lane]);
    std::fill(to + lane * p.c, to + (lane + 1) * p.c, 0.0f);
    for (int64_t i = 0; i < num_parts; i++) {
      const float share = std::exp(parts[i].largest[lane] - largest);
      const float* context = parts[i].context.data() + lane / LANES * p.c * LANES + lane % LANES;
      total += parts[i].total[lane] * share;
      for (int64_t j = 0; j < p.c; j++) to[lane * p.c + j] += context[j * LANES] * share;
    }
    // a query that may look nowhere gives zeros
    if (total > 0.0f)
      for (int64_t j = 0; j < p.c; j++) to[lane * p.c + j] /= total;
  }
}

template <class Rows>
void attend_to_all(const Problem& p, const Rows& rows, float* context) {
  const int64_t wanted = ceil_div(PARTS * at::get_num_threads(), p.batch);
  const int64_t per_sequence = std::max<int64_t>(1, std::min(wanted, p.tokens / FEWEST));
  const int64_t per_part = ceil_div(ceil_div(p.tokens, TILE), per_sequence) * TILE;
  std::vector<Part> parts(p.batch * per_sequence, Part(p));
  std::vector<std::vector<float>> queries(p.batch);
  share(p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) queries[i] = queries_in_lanes(p, i);
  });
  share(parts.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> tile(TILE * p.width(), 0.0f);
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t sequence = unit / per_sequence, last = std::min((unit % per_sequence + 1) * per_part, p.tokens);
      for (int64_t first = unit % per_sequence * per_part; first < last; first += TILE) {
        const int64_t count = std::min(TILE, last - first);
        for_tokens(p, sequence, first, count, [&](int64_t token, const char* latent, const char* rotary) {
          float* to = tile.data() + (token - first) * p.width();
          rows.read(latent, to);
          widen_row(reinterpret_cast<const typename Rows::Rotary*>(rotary), p.r, to + p.c);
        });
        for (int64_t group = 0; group < p.padded_lanes / LANES; group++)
          attend_to_tile(p, rows, sequence, group, first, count, tile.data(), queries[sequence].data(), parts[unit]);
      }
    }
  });
  share(p.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      merge(p, parts.data() + i * per_sequence, per_sequence, context + i * p.lanes * p.c);
  });
}

// Scaled queries [b s h w] in float32 over stretches of latents [b or 1, t', c] and rotary keys [b or 1, t', r]: the
// weighted sums of latents [b s h c]. Of latents in `bits` ("8", "6", "5", "4" or "fp8") the bytes of codes and scales
// are given, with rotary keys in bfloat16. The mask is added to scores, -inf where a query may not look; none is causal.
at::Tensor attend(
    const at::Tensor& queries, at::TensorList latents, at::TensorList rotary_keys,
    const std::optional<at::Tensor>& mask, c10::string_view bits) {
  TORCH_CHECK_VALUE(queries.is_contiguous() && queries.scalar_type() == at::kFloat, "expected queries in float32.");
  TORCH_CHECK_VALUE(latents.size() > 0 && latents.size() == rotary_keys.size(), "expected as many latents as keys.");
  Problem p{};
  p.batch = queries.size(0), p.queries = queries.size(1), p.heads = queries.size(2);
  p.lanes = p.queries * p.heads, p.padded_lanes = ceil_div(p.lanes, LANES) * LANES;
  p.r = rotary_keys[0].size(2), p.c = queries.size(3) - p.r;
  p.rows = queries.const_data_ptr<float>();
  const at::ScalarType kind = latents[0].scalar_type();
  for (size_t i = 0; i < latents.size(); i++) {
    const at::Tensor &latent = latents[i], &rotary = rotary_keys[i];
    TORCH_CHECK_VALUE(
        latent.stride(2) == 1 && rotary.stride(2) == 1 && latent.scalar_type() == kind &&
            rotary.scalar_type() == (bits.empty() ? kind : at::kBFloat16),
        "expected latents and rotary keys of one kind, whose elements follow each other.");
    const int64_t a = latent.element_size(), b = rotary.element_size();
    p.stretches.push_back(
        {static_cast<const char*>(latent.const_data_ptr()), static_cast<const char*>(rotary.const_data_ptr()),
         latent.stride(1) * a, rotary.stride(1) * b, latent.size(0) == 1 ? 0 : latent.stride(0) * a,
         rotary.size(0) == 1 ? 0 : rotary.stride(0) * b, p.tokens, p.tokens + latent.size(1)});
    p.tokens += latent.size(1);
  }
  if (mask) {
    const std::array<int64_t, 4> sizes{p.batch, p.heads, p.queries, p.tokens};
    for (int i = 0; i < 4; i++)
      TORCH_CHECK_VALUE(
          mask->dim() == 4 && (mask->size(i) == sizes[i] || (i < 2 && mask->size(i) == 1)), "expected a mask of [b ",
          "or 1, 1 or h, s, t] = ", at::IntArrayRef(sizes), ", got ", mask->sizes(), ".");
    p.mask = mask->const_data_ptr<float>();
    for (int i = 0; i < 4; i++) p.mask_steps[i] = mask->size(i) == 1 ? 0 : mask->stride(i);
  }
  at::Tensor context = at::empty({p.batch, p.queries, p.heads, p.c}, queries.options());
  const auto attend_to = [&](const auto& rows) {
    const int64_t width = rows.bytes() / latents[0].element_size();
    TORCH_CHECK_VALUE(latents[0].size(2) == width, "expected latents of width ", width, ", got ", latents[0].sizes());
    attend_to_all(p, rows, context.mutable_data_ptr<float>());
  };
  if (bits == "fp8") {
    attend_to(Float8{p.c});
  } else if (!bits.empty()) {
    attend_to(Integers(p.c, bits[0] - '0'));
  } else if (kind == at::kBFloat16) {
    attend_to(Plain<c10::BFloat16>{p.c});
  } else {
    TORCH_CHECK_VALUE(kind == at::kFloat, "expected latents of bfloat16 or float32, got ", kind, ".");
    attend_to(Plain<float>{p.c});
  }
  return context;
}

}  // namespace latent

TORCH_LIBRARY_FRAGMENT(deepseek_latent, library) {
  library.def(
      "attend(Tensor queries, Tensor[] latents, Tensor[] rotary_keys, Tensor? mask=None, str bits='') -> Tensor");
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) { library.impl("attend", latent::attend); }
