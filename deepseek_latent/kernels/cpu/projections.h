// Functions that other files call: products of products.cpp, absorption of projections.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "products.h"

namespace latent {

std::vector<Inputs> inputs_of(const at::Tensor& x, at::ScalarType weight_dtype);
at::Tensor linear(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& scales);
at::Tensor absorb(const at::Tensor& x, const at::Tensor& w);
at::Tensor expand(const at::Tensor& x, const at::Tensor& w);

}  // namespace latent
