"""Fast operators for CPUs, built from the C++ in this folder at first use: `optimize_for_inference(model)`."""

from .optimized import Optimized, optimize_for_inference

__all__ = ["Optimized", "optimize_for_inference"]
