"""Fast operators, in C++ for CPUs and in Triton for GPUs, that `optimize_for_inference(model)` puts into a model."""

from .optimized import Optimized, optimize_for_inference

__all__ = ["Optimized", "optimize_for_inference"]
