"""Operators for CPUs, written in C++ and built at first use."""
