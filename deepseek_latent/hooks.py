"""Whether calling a module does more than its class says: then reading its weights would leave something out."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    # accelerate replaces `forward` on the instance
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))
