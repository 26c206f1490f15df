// Rows of a weight as products read them: float elements, or int8 codes with one scale per row or per group of a row.
//
// Letters: n rows of a weight, k their width.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <type_traits>
#include <vector>

#include "checks.h"
#include "vectors.h"

namespace latent {

// float32 or bfloat16 numbers, read in the dtype in which they are stored
struct Scales {
  const void* data = nullptr;
  bool is_bfloat16 = false;

  float operator[](int64_t i) const {
    return is_bfloat16 ? static_cast<float>(static_cast<const c10::BFloat16*>(data)[i])
                       : static_cast<const float*>(data)[i];
  }
  Scales from(int64_t i) const {
    return {static_cast<const char*>(data) + i * (is_bfloat16 ? sizeof(c10::BFloat16) : sizeof(float)), is_bfloat16};
  }
};

// A weight [.. n k], and the scales [.. n] or [.. n groups] of one in int8.
struct Weight {
  const at::Tensor& elements;
  const at::Tensor* scales = nullptr;

  bool is_int8() const { return elements.scalar_type() == at::kChar; }
  int64_t width() const { return elements.size(-1); }
  int64_t num_groups() const { return scales && scales->dim() == elements.dim() ? scales->size(-1) : 1; }
  Scales scales_as_stored() const {
    if (!scales) return {};
    return {scales->const_data_ptr(), scales->scalar_type() == at::kBFloat16};
  }
};

// A weight with its scales. Throws unless it has these sizes, and both can be read row by row.
inline Weight weight_of(const at::Tensor& elements, const at::Tensor* scales, const char* name, Sizes sizes) {
  const Weight weight{elements, scales};
  check(elements, name, sizes, {at::kBFloat16, at::kFloat, at::kChar});
  check_contiguous(elements, name);
  TORCH_CHECK_VALUE(
      weight.is_int8() == (scales != nullptr), "expected scales for an int8 weight, and for no other, got ", name, " in ",
      elements.scalar_type(), scales ? " with" : " without", " scales.");
  if (!scales) return weight;
  const at::IntArrayRef rows = elements.sizes().slice(0, elements.dim() - 1), given = scales->sizes();
  const bool is_grouped = scales->dim() == elements.dim();
  TORCH_CHECK_VALUE(
      scales->is_contiguous() && (is_grouped ? given.slice(0, rows.size()) : given) == rows &&
          (!is_grouped || (given.back() > 0 && weight.width() % given.back() == 0)),
      "expected scales of ", name, " = ", elements.sizes(), " in one piece, one per row or [.. rows, groups] with groups that ",
      "divide a row, got ", given, " with strides ", scales->strides(), ".");
  check(*scales, "scales of int8 rows", given, FLOATS);
  return weight;
}

inline Weight weight_of(
    const at::Tensor& elements, const std::optional<at::Tensor>& scales, const char* name, Sizes sizes) {
  return weight_of(elements, scales ? &*scales : nullptr, name, sizes);
}

// Rows `step` elements apart. The scale of an int8 row is applied to its sums.
template <class T>
struct Rows {
  static constexpr bool is_bfloat16 = std::is_same_v<T, c10::BFloat16>;
  const T* data;
  int64_t step;
  Scales scales = {};

  explicit Rows(const Weight& weight)
      : data(static_cast<const T*>(weight.elements.const_data_ptr())), step(weight.width()),
        scales(weight.scales_as_stored()) {}
  Rows(const T* data, int64_t step, Scales scales = {}) : data(data), step(step), scales(scales) {}

  const T* at(int64_t row, int64_t i) const { return data + row * step + i; }
  Rows from(int64_t row) const { return {data + row * step, step, scales.data ? scales.from(row) : scales}; }
  float scale(int64_t row) const {
    if constexpr (std::is_same_v<T, int8_t>) return scales[row];
    return 1.0f;
  }
  void widen(int64_t row, int64_t start, int64_t count, float* to) const { widen_row(at(row, start), count, to); }
};

// Rows of int8 codes `step` apart with several scales per row, each for `width` codes next to each other. The scales of
// rows that follow each other are `groups` apart.
struct GroupedRows {
  static constexpr bool is_bfloat16 = false;
  const int8_t* data;
  int64_t step;
  Scales scales;
  int64_t groups, width;

  explicit GroupedRows(const Weight& weight)
      : data(static_cast<const int8_t*>(weight.elements.const_data_ptr())), step(weight.width()),
        scales(weight.scales_as_stored()), groups(weight.num_groups()), width(step / groups) {}

  const int8_t* at(int64_t row, int64_t i) const { return data + row * step + i; }
  GroupedRows from(int64_t row) const {
    GroupedRows rows = *this;
    rows.data += row * step;
    rows.scales = scales.from(row * groups);
    return rows;
  }
  float scale(int64_t row) const { return 1.0f; }
  float scale_of_group(int64_t row, int64_t group) const { return scales[row * groups + group]; }
  // true if any sixteen codes from a multiple of sixteen on share a scale
  bool has_whole_vectors() const { return width % LANES == 0; }
  void widen(int64_t row, int64_t start, int64_t count, float* to) const {
    widen_row(at(row, start), count, to);
    for (int64_t i = 0, end; i < count; i = end) {
      const int64_t group = (start + i) / width;
      end = std::min((group + 1) * width - start, count);
      const float scale = scale_of_group(row, group);
      for (int64_t j = i; j < end; j++) to[j] *= scale;
    }
  }
  // at most sixteen codes from i on, with zeros behind the last
  Floats widen_some(int64_t row, int64_t i, int64_t count) const {
    float some[LANES] = {};
    widen(row, i, count, some);
    return load<Floats>(some);
  }
};

// Calls body with a function that gives the rows of each of these weights, as objects of one type.
template <class Body>
void with_rows(const std::vector<Weight>& weights, Body body) {
  const Weight& first = weights[0];
  bool is_grouped = false;
  for (const Weight& weight : weights) {
    const at::ScalarType dtype = first.elements.scalar_type(), got = weight.elements.scalar_type();
    TORCH_CHECK_VALUE(got == dtype, "expected weights of one dtype, got ", dtype, " and ", got, ".");
    is_grouped |= weight.num_groups() > 1;
  }
  if (is_grouped) return body([](const Weight& weight) { return GroupedRows(weight); });
  if (first.is_int8()) return body([](const Weight& weight) { return Rows<int8_t>(weight); });
  if (first.elements.scalar_type() == at::kBFloat16)
    return body([](const Weight& weight) { return Rows<c10::BFloat16>(weight); });
  body([](const Weight& weight) { return Rows<float>(weight); });
}

}  // namespace latent
