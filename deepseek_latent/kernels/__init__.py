"""Fast operators, in C++ for CPUs and in Triton for GPUs; `optimize_for_inference(model)` makes a model use them."""

from .optimized import Optimized, optimize_for_inference

__all__ = ["Optimized", "optimize_for_inference"]
