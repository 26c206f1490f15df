"""Operators for CPUs, in C++ that is built at first use."""
