// Operators compute no gradients. An input that wants one is refused, because torch would only warn in `backward`.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

namespace latent {

bool wants_gradient(const c10::IValue& argument) {
  if (argument.isTensor()) return argument.toTensor().requires_grad();
  if (!argument.isTensorList()) return false;
  for (const at::Tensor& x : argument.toTensorVector())
    if (x.requires_grad()) return true;
  return false;
}

void refuse_gradients(const c10::OperatorHandle& operation, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled())
    for (const c10::IValue& argument : torch::jit::last(*stack, operation.schema().arguments().size()))
      TORCH_CHECK_VALUE(
          !wants_gradient(argument), "expected inputs of ", operation.schema().name(), " that need no gradient, which it does ",
          "not compute; call it under torch.no_grad().");
  const at::AutoDispatchBelowAutograd below;
  operation.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

}  // namespace latent

TORCH_LIBRARY_IMPL(deepseek_latent, AutogradCPU, library) {
  for (const char* name :
       {"linear", "grouped", "absorb", "expand", "rms_norm", "rotate", "project", "experts", "mlp", "attend", "attention"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&latent::refuse_gradients>());
}
