"""Operators for GPUs, in Triton."""
