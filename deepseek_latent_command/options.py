"""Types and choices of options that several commands have."""

import argparse
from collections.abc import Callable

# names of torch's
DTYPES = ("float32", "bfloat16", "float16")
# how `deepseek_latent.LatentCache` quantizes latents
CACHE_DTYPES = ("int8", "int6", "int5", "int4", "fp8")
BYTE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def number_between(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argument type: a number of type `kind` from `low` to `high`."""

    def parse(text: str) -> float:
        if not low <= (number := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"expected {low} to {high}, got {text}")
        return number

    # argparse writes "invalid int value"
    parse.__name__ = kind.__name__
    return parse


def byte_size(text: str) -> int:
    """An argument type: a number of bytes such as 500MB."""
    for unit, num_bytes in BYTE_UNITS.items():
        number = text.upper().removesuffix(unit)
        if number != text.upper() and number.isdigit() and int(number):
            return int(number) * num_bytes
    raise argparse.ArgumentTypeError(f"expected a whole number of KB, MB, GB or TB, such as 500MB, got {text}")
