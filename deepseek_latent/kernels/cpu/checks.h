// What every operator does before it reads: it checks the sizes, dtype and layout of each argument, once per call. Errors say
// what was expected and what came.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <string>

namespace latent {

constexpr int64_t ANY = -1;  // a size that is not checked

using Sizes = at::IntArrayRef;
using Dtypes = std::initializer_list<at::ScalarType>;

constexpr Dtypes FLOATS{at::kBFloat16, at::kFloat};

// "[3, *, 5]", where a star stands for any size
inline std::string text_of(Sizes sizes) {
  std::ostringstream text;
  for (const int64_t size : sizes) text << (text.tellp() > 0 ? ", " : "[") << (size == ANY ? "*" : std::to_string(size));
  return text.str() + "]";
}

inline std::string text_of(Dtypes dtypes) {
  std::ostringstream text;
  for (const at::ScalarType dtype : dtypes) text << (text.tellp() > 0 ? " or " : "") << dtype;
  return text.str();
}

// throws unless x has these sizes and one of these dtypes; `name` is that of the argument, with the letters of its axes
inline void check(const at::Tensor& x, const char* name, Sizes sizes, Dtypes dtypes) {
  const auto fits = [](int64_t size, int64_t expected) { return expected == ANY || size == expected; };
  TORCH_CHECK_VALUE(
      std::equal(x.sizes().begin(), x.sizes().end(), sizes.begin(), sizes.end(), fits), "expected ", name, " of sizes ",
      text_of(sizes), ", got ", x.sizes(), ".");
  TORCH_CHECK_VALUE(
      std::find(dtypes.begin(), dtypes.end(), x.scalar_type()) != dtypes.end(), "expected ", name, " in ", text_of(dtypes),
      ", got ", x.scalar_type(), ".");
  // the compiler assumes it, and memory that another library gave may begin anywhere
  TORCH_CHECK_VALUE(
      reinterpret_cast<uintptr_t>(x.const_data_ptr()) % x.element_size() == 0, "expected ", name, " at an address that is a ",
      "multiple of its element's ", x.element_size(), " bytes; copy it with .clone().");
}

// throws unless the elements of each row of x follow each other
inline void check_rows(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(
      x.size(-1) <= 1 || x.stride(-1) == 1, "expected ", name, " whose rows lie in one piece, got strides ", x.strides(),
      "; call .contiguous().");
}

// throws unless x lies in one piece
inline void check_contiguous(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(
      x.is_contiguous(), "expected ", name, " in one piece, got strides ", x.strides(), "; call .contiguous().");
}

// throws unless x holds tokens [m k]
inline void check_tokens(const at::Tensor& x, int64_t k) {
  check(x, "x [m k]", {ANY, k}, FLOATS);
  check_rows(x, "x [m k]");
}

}  // namespace latent
