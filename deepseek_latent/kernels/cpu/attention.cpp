// Attention of few queries over many cached latents, which are read once, as they are stored.
//
// Letters are those of attention_tile.h.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <vector>

#include "attention_tile.h"
#include "projections.h"

namespace latent {

constexpr int64_t MIN_TOKENS_PER_PART = 10 * TILE;
constexpr int64_t MIN_TOKENS_TO_SKIP = 512;  // with fewer, the search for what can be skipped takes longer than it saves
constexpr int64_t PARTS_PER_THREAD = 4;  // several, so that no thread waits long for another

// combines the parts of one sequence into its result [s h c]
void merge(const Problem& p, const Part* parts, int64_t num_parts, float* to) {
  for (int64_t row = 0; row < p.rows; row++) {
    float largest = LOWEST, total = 0.0f, *sums = to + row * p.c;
    for (int64_t i = 0; i < num_parts; i++) largest = std::max(largest, parts[i].largest.data()[row]);
    std::fill(sums, sums + p.c, 0.0f);
    for (int64_t i = 0; i < num_parts; i++) {
      const float share = std::exp(parts[i].largest.data()[row] - largest);
      const float* context = parts[i].context.data() + row * p.latent_width();
      total += parts[i].total.data()[row] * share;
      for (int64_t j = 0; j < p.c; j++) sums[j] += context[j] * share;
    }
    // a query that sees no token gives zeros
    if (total > 0.0f)
      for (int64_t j = 0; j < p.c; j++) sums[j] /= total;
  }
}

// queries [b][rows][width], scaled, to context [b s h c]
template <class Rows>
void attend_to_all(const Problem& p, const Rows& rows, const Aligned& queries, float* context) {
  const int64_t wanted = ceil_div(PARTS_PER_THREAD * at::get_num_threads(), p.batch);
  const int64_t per_sequence = std::max<int64_t>(1, std::min(wanted, p.tokens / MIN_TOKENS_PER_PART));
  const int64_t per_part = ceil_div(ceil_div(p.tokens, TILE), per_sequence) * TILE;
  std::vector<Part> parts(p.batch * per_sequence, Part(p));
  std::vector<UsedColumns> used;
  for (int64_t sequence = 0; sequence < p.batch; sequence++)
    used.emplace_back(queries.data() + sequence * p.padded_rows * p.width(), p.padded_rows, p.width());
  share(parts.size(), 1, 1, [&](int64_t begin, int64_t end) {
    Aligned tile(TILE * p.width());
    for (int64_t unit = begin; unit < end; unit++) {
      const int64_t sequence = unit / per_sequence, last = std::min((unit % per_sequence + 1) * per_part, p.tokens);
      const float* own = queries.data() + sequence * p.padded_rows * p.width();
      for (int64_t first = unit % per_sequence * per_part; first < last; first += TILE) {
        const Tokens here(p, sequence, first, last), next(p, sequence, first + TILE, last);
        for (int64_t row = 0; row < p.rows; row += LANES)
          attend_to_tile(p, rows, sequence, row, first, here, next, own, used[sequence], tile.data(), parts[unit]);
      }
    }
  });
  share(p.batch, 1, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++)
      merge(p, parts.data() + i * per_sequence, per_sequence, context + i * p.rows * p.c);
  });
}

// puts absorbed queries [b s h c] in float32 and rotary ones [b s h r] side by side, scaled: [b][rows][width]
Aligned side_by_side(const Problem& p, const at::Tensor& absorbed, const at::Tensor& q_rotary, double scale) {
  const at::Tensor rotary = q_rotary.to(at::kFloat).contiguous();
  const float *from = absorbed.const_data_ptr<float>(), *from_rotary = rotary.const_data_ptr<float>();
  Aligned queries(p.batch * p.padded_rows * p.width());
  share(p.batch * p.rows, 64, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      float* to = queries.data() + (i / p.rows * p.padded_rows + i % p.rows) * p.width();
      for (int64_t j = 0; j < p.c; j++) to[j] = from[i * p.c + j] * static_cast<float>(scale);
      for (int64_t j = 0; j < p.r; j++) to[p.c + j] = from_rotary[i * p.r + j] * static_cast<float>(scale);
    }
  });
  return queries;
}

// the bytes of a stored latent
int64_t bytes_of(int64_t c, at::ScalarType kind, c10::string_view bits) {
  if (bits.empty()) return c * (kind == at::kBFloat16 ? sizeof(c10::BFloat16) : sizeof(float));
  return bits == "fp8" ? Float8{c}.bytes() : Integers(c, bits[0] - '0').bytes();
}

// sets the tokens of a problem from the arguments of `attend`
void read_tokens(Problem& p, at::TensorList latents, at::TensorList rotary_keys, c10::string_view bits) {
  TORCH_CHECK_VALUE(
      bits.empty() || bits == "8" || bits == "6" || bits == "5" || bits == "4" || bits == "fp8",
      "expected bits among '', '8', '6', '5', '4' and 'fp8', got '", bits, "'.");
  TORCH_CHECK_VALUE(
      latents.size() > 0 && latents.size() == rotary_keys.size(), "expected as many latents as rotary keys, and at least one, ",
      "got ", latents.size(), " and ", rotary_keys.size(), ".");
  const at::ScalarType first = latents[0].scalar_type();
  const at::ScalarType kind = bits.empty() && first == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  const at::ScalarType stored = bits.empty() ? kind : at::kByte, key = bits.empty() ? kind : at::kBFloat16;
  const bool has_keys = rotary_keys[0].dim() > 0;
  p.u = bits.empty() || !has_keys ? 0 : std::clamp<int64_t>(rotary_keys[0].size(-1) - p.r, 0, p.c);
  const int64_t width = bytes_of(p.c - p.u, kind, bits) / static_cast<int64_t>(c10::elementSize(stored));
  for (size_t i = 0; i < latents.size(); i++) {
    const at::Tensor &latent = latents[i], &rotary = rotary_keys[i];
    const bool is_shared = latent.dim() > 0 && latent.size(0) == 1, is_key_shared = rotary.dim() > 0 && rotary.size(0) == 1;
    check(latent, "latents [b or 1, t, width]", {is_shared ? 1 : p.batch, ANY, width}, {stored});
    check(rotary, "rotary keys [b or 1, t, r]", {is_key_shared ? 1 : p.batch, latent.size(1), p.u + p.r}, {key});
    check_rows(latent, "latents [b or 1, t, width]");
    check_rows(rotary, "rotary keys [b or 1, t, r]");
    const int64_t a = latent.element_size(), b = rotary.element_size();
    p.segments.push_back(
        {static_cast<const char*>(latent.const_data_ptr()), static_cast<const char*>(rotary.const_data_ptr()),
         latent.stride(1) * a, rotary.stride(1) * b, latent.size(0) == 1 ? 0 : latent.stride(0) * a,
         rotary.size(0) == 1 ? 0 : rotary.stride(0) * b, p.tokens, p.tokens + latent.size(1)});
    p.tokens += latent.size(1);
  }
}

// sets the mask of a problem
void read_mask(Problem& p, const at::Tensor& mask) {
  const std::array<int64_t, 4> sizes{p.batch, p.heads, p.queries, p.tokens};
  for (int i = 0; i < 4; i++)
    TORCH_CHECK_VALUE(
        mask.dim() == 4 && (mask.size(i) == sizes[i] || (i < 2 && mask.size(i) == 1)), "expected a mask of [b or 1, 1 ",
        "or h, s, t] = ", at::IntArrayRef(sizes), ", got ", mask.sizes(), ".");
  check(mask, "a mask", mask.sizes(), {at::kFloat});
  p.mask = mask.const_data_ptr<float>();
  for (int i = 0; i < 4; i++) p.mask_steps[i] = mask.size(i) == 1 ? 0 : mask.stride(i);
}

// For each head, whether w_uv [h v c] reads any of the columns of a block of WEIGHTED_VECTORS. A dense one says so in its first
// row; one that selects the values of a group, as in models that were converted from grouped queries, is zero in most blocks.
std::vector<uint8_t> blocks_read(const at::Tensor& w_uv) {
  constexpr int64_t WIDTH = WEIGHTED_VECTORS * LANES;
  const int64_t h = w_uv.size(0), v = w_uv.size(1), c = w_uv.size(2), blocks = ceil_div(c, WIDTH);
  std::vector<uint8_t> is_read(h * blocks, 0);
  with_floats(w_uv, [&](auto* data) {
    for (int64_t head = 0; head < h; head++) {
      uint8_t* const of_head = is_read.data() + head * blocks;
      int64_t left = blocks;
      for (int64_t row = 0; row < v && left > 0; row++) {
        const auto* const weights = data + head * w_uv.stride(0) + row * w_uv.stride(1);
        for (int64_t block = 0; block < blocks; block++) {
          if (of_head[block]) continue;
          bool any = false;
          for (int64_t j = block * WIDTH; j < std::min((block + 1) * WIDTH, c); j++)
            any |= static_cast<float>(weights[j]) != 0.0f;
          of_head[block] = any, left -= any;
        }
      }
    }
  });
  return is_read;
}

// Absorbed queries [b s h c] in float32 and rotary ones [b s h r] attend to segments of latents [b or 1, t', c] and rotary
// keys [b or 1, t', r]; the result is the weighted sums of latents [b s h c]. If latents are stored in `bits` ("8", "6", "5",
// "4" or "fp8"), they are the bytes of codes and scales, and rotary keys are in bfloat16; if these are wider than r, they begin
// with the last channels of the latents, of which there are no codes. The mask is added to scores and is -inf where a query may
// not look; without a mask, attention is causal. Where w_uv is not null, the sums of columns that it multiplies by zero may be
// zeros.
at::Tensor attend_for(
    const at::Tensor& absorbed, const at::Tensor& q_rotary, at::TensorList latents, at::TensorList rotary_keys,
    double scale, const std::optional<at::Tensor>& mask, c10::string_view bits, const at::Tensor* w_uv) {
  check(absorbed, "absorbed [b s h c]", {ANY, ANY, ANY, ANY}, {at::kFloat});
  check_contiguous(absorbed, "absorbed [b s h c]");
  check(q_rotary, "q_rotary [b s h r]", {absorbed.size(0), absorbed.size(1), absorbed.size(2), ANY}, FLOATS);
  Problem p{};
  p.batch = absorbed.size(0), p.queries = absorbed.size(1), p.heads = absorbed.size(2), p.c = absorbed.size(3);
  p.rows = p.queries * p.heads, p.padded_rows = ceil_div(p.rows, LANES) * LANES, p.r = q_rotary.size(3);
  read_tokens(p, latents, rotary_keys, bits);
  if (mask) read_mask(p, *mask);
  if (w_uv && p.tokens >= MIN_TOKENS_TO_SKIP) {
    check(*w_uv, "w_uv [h v c]", {p.heads, ANY, p.c}, FLOATS);
    check_rows(*w_uv, "w_uv [h v c]");
    p.is_read = blocks_read(*w_uv);
  }
  at::Tensor context = at::empty_like(absorbed);
  if (context.numel() == 0) return context;
  const Aligned queries = side_by_side(p, absorbed, q_rotary, scale);
  const auto attend_to = [&](const auto& rows) {
    attend_to_all(p, rows, queries, context.mutable_data_ptr<float>());
  };
  if (bits == "fp8") {
    attend_to(Float8{p.c - p.u});
  } else if (!bits.empty()) {
    attend_to(Integers(p.c - p.u, bits[0] - '0'));
  } else if (latents[0].scalar_type() == at::kBFloat16) {
    attend_to(Plain<c10::BFloat16>{p.c});
  } else {
    attend_to(Plain<float>{p.c});
  }
  return context;
}

at::Tensor attend(
    const at::Tensor& absorbed, const at::Tensor& q_rotary, at::TensorList latents, at::TensorList rotary_keys,
    double scale, const std::optional<at::Tensor>& mask, c10::string_view bits) {
  return attend_for(absorbed, q_rotary, latents, rotary_keys, scale, mask, bits, nullptr);
}

// `attend` between projections: w_uk [h n c] absorbs q_content [b s h n] before it, and w_uv [h v c] expands its result:
// [b s h v] in the dtype of the weights
at::Tensor attention(
    const at::Tensor& q_content, const at::Tensor& q_rotary, const at::Tensor& w_uk, const at::Tensor& w_uv,
    at::TensorList latents, at::TensorList rotary_keys, double scale, const std::optional<at::Tensor>& mask,
    c10::string_view bits) {
  check(q_content, "q_content [b s h n]", {ANY, ANY, ANY, ANY}, FLOATS);
  const at::Tensor absorbed = absorb(q_content.flatten(0, 1), w_uk).unflatten(0, q_content.sizes().slice(0, 2));
  const at::Tensor context = attend_for(absorbed, q_rotary, latents, rotary_keys, scale, mask, bits, &w_uv);
  return expand(context.flatten(0, 1), w_uv).unflatten(0, q_content.sizes().slice(0, 2));
}

}  // namespace latent

TORCH_LIBRARY_FRAGMENT(deepseek_latent, library) {
  library.def(
      "attend(Tensor absorbed, Tensor q_rotary, Tensor[] latents, Tensor[] rotary_keys, float scale, Tensor? mask=None, "
      "str bits='') -> Tensor");
  library.def(
      "attention(Tensor q_content, Tensor q_rotary, Tensor w_uk, Tensor w_uv, Tensor[] latents, Tensor[] rotary_keys, "
      "float scale, Tensor? mask=None, str bits='') -> Tensor");
}

TORCH_LIBRARY_IMPL(deepseek_latent, CPU, library) {
  library.impl("attend", latent::attend);
  library.impl("attention", latent::attention);
}
