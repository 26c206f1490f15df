"""The formats of cached tokens, one row per token: unquantized, in integers of 8, 6, 5 or 4 bits, or in fp8.

Letters: c latent width, r rotary width, u unquantized channels of a latent, its last ones. A plane is 128 consecutive
elements of the c - u others.
"""

from dataclasses import dataclass
from functools import reduce
from inspect import Parameter, signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compat.arguments import unknown_argument

# the values of `LatentCache(cache_dtype=)`; None is the dtype that the model computes in
CACHE_DTYPES = (None, "int8", "int6", "int5", "int4", "fp8")
# what others call such an argument, as a number
NUMBERS_OF_BITS = ("bits", "nbits")
PLANE = 128


@dataclass(frozen=True)
class LatentFormat:
    """Latent and rotary key side by side, unquantized: rows [.. c+r] in the model's dtype."""

    latent_width: int
    rotary_width: int
    dtype: torch.dtype  # of the tensors that `encode` is given

    cache_dtype = None

    @property
    def storage_dtype(self) -> torch.dtype:
        return self.dtype

    @property
    def row_width(self) -> int:
        """Elements of `storage_dtype` per token."""
        return self.latent_width + self.rotary_width

    def encode(self, latent: Tensor, k_rotary: Tensor) -> Tensor:
        """Converts [.. c] and [.. r] to rows [.. row_width]."""
        return torch.cat((latent, k_rotary), dim=-1)

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Converts rows to [.. c+r] in `dtype`; the result is a view if nothing has to be computed."""
        return rows.to(dtype)


@dataclass(frozen=True)
class QuantizedFormat(LatentFormat):
    """Rows of bytes: codes of a latent's first c - u elements, one scale per plane of 128, and all else in bfloat16.

    What is in bfloat16 are the last u elements of the latent and the rotary key, side by side. u is 0 but for models
    whose conversion put what codes hold badly there. A scale applies to a whole plane, so a kernel can multiply scores
    and probabilities by it instead of elements.
    """

    num_unquantized: int = 0

    @property
    def coded_width(self) -> int:
        """c - u."""
        return self.latent_width - self.num_unquantized

    @property
    def storage_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def row_width(self) -> int:
        return self._scales.stop + 2 * (self.num_unquantized + self.rotary_width)

    @property
    def _scales(self) -> slice:
        # the offset is a multiple of 4, so that scales are aligned for any widths
        start = -(-self._num_code_bytes // 4) * 4
        num_planes = -(-self.coded_width // PLANE)
        return slice(start, start + num_planes * self._scale_dtype.itemsize)

    def encode(self, latent: Tensor, k_rotary: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (latent.requires_grad or k_rotary.requires_grad):
            raise ValueError(
                f"latents quantized to {self.cache_dtype} carry no gradient: generate or evaluate under "
                "torch.no_grad(), or use a LatentCache without cache_dtype."
            )
        in_bfloat16 = k_rotary
        if self.num_unquantized:
            latent, unquantized = latent.split((self.coded_width, self.num_unquantized), dim=-1)
            in_bfloat16 = torch.cat((unquantized, k_rotary), dim=-1)
        planes = latent.float().split(PLANE, dim=-1)
        scales = self._scales_of(torch.stack([plane.abs().amax(dim=-1) for plane in planes], dim=-1))
        scaled = [plane / scale for plane, scale in zip(planes, scales.float().split(1, dim=-1))]
        rows = latent.new_zeros(*latent.shape[:-1], self.row_width, dtype=torch.uint8)
        rows[..., : self._num_code_bytes] = self._to_code_bytes(torch.cat(scaled, dim=-1))
        rows[..., self._scales] = scales.view(torch.uint8)
        rows[..., self._scales.stop :] = in_bfloat16.bfloat16().contiguous().view(torch.uint8)
        return rows

    def decode(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        coded, width = self.coded_width, self.latent_width + self.rotary_width
        # float32 also for half precision, so that the product of code and scale is rounded once
        out = rows.new_empty(*rows.shape[:-1], width, dtype=torch.promote_types(dtype, torch.float32))
        self._from_code_bytes(rows[..., : self._num_code_bytes], out[..., :coded])
        scales = rows[..., self._scales].view(self._scale_dtype).to(out.dtype)
        for plane, scale in zip(out[..., :coded].split(PLANE, dim=-1), scales.split(1, dim=-1)):
            plane.mul_(scale)
        out[..., coded:] = rows[..., self._scales.stop :].view(torch.bfloat16)
        return out.to(dtype)


@dataclass(frozen=True)
class IntegerFormat(QuantizedFormat):
    """Latent elements as integers of `bits` bits: at c = 512, r = 64 a row is 648, 520, 456 or 392 bytes.

    With m the largest magnitude of a plane, the range from 0 to m and that from 0 to -m have 2^(bits-1) cells each, and
    an element is rounded to the middle of its cell. So it changes by at most m 2^-bits (times 1.008, since the bfloat16
    scale is rounded up). Codes are unsigned. With g = gcd(bits, 8), a row has bits/g byte planes for 8/g code planes.
    The low bits of byte plane i are code plane i; the g bits above them in each byte plane make up the other code
    planes. So no code spans two bytes, and masks and shifts alone turn a vector of bytes into vectors of codes.
    """

    bits: int = 8

    _scale_dtype = torch.bfloat16

    @property
    def cache_dtype(self) -> str:
        return f"int{self.bits}"

    @property
    def _shared_bits(self) -> int:
        # gcd(bits, 8), computed in a way that torch.compile can trace
        return self.bits & -self.bits

    @property
    def _code_plane_width(self) -> int:
        return -(-self.coded_width * self._shared_bits // 8)

    @property
    def _num_code_bytes(self) -> int:
        return self._code_plane_width * self.bits // self._shared_bits

    def _scales_of(self, largest: Tensor) -> Tensor:
        # 1.004, because rounding to bfloat16 subtracts up to 2^-8, and the largest element must stay within its cell
        scales = largest * (1.004 * 2.0 ** (1 - self.bits))
        return scales.clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()

    def _to_code_bytes(self, scaled: Tensor) -> Tensor:
        half = 1 << (self.bits - 1)
        codes = (scaled.floor() + half).clamp(0, 2 * half - 1).to(torch.uint8)
        g, num_byte_planes = self._shared_bits, self.bits // self._shared_bits
        missing = 8 // g * self._code_plane_width - self.coded_width
        planes = torch.unflatten(F.pad(codes, (0, missing)), -1, (8 // g, -1))
        byte_planes = planes[..., :num_byte_planes, :].contiguous()
        for k, split_plane in enumerate(planes.unbind(-2)[num_byte_planes:]):
            for i, byte_plane in enumerate(byte_planes.unbind(-2)):
                above = self.bits + g * k
                byte_plane |= split_plane << (above - g * i) & ((1 << g) - 1) << above
        return byte_planes.flatten(-2)

    def _from_code_bytes(self, code_bytes: Tensor, out: Tensor) -> None:
        g, num_byte_planes = self._shared_bits, self.bits // self._shared_bits
        byte_planes = torch.unflatten(code_bytes, -1, (num_byte_planes, self._code_plane_width)).unbind(-2)
        code_planes = out.split(self._code_plane_width, dim=-1)
        for codes, x in zip(code_planes, byte_planes):
            lowest = x & ((1 << self.bits) - 1) if self.bits < 8 else x
            # the last plane may be shorter
            codes.copy_(lowest[..., : codes.shape[-1]])
        for k, codes in enumerate(code_planes[num_byte_planes:]):
            above = self.bits + g * k
            parts = [x >> (above - g * i) & ((1 << g) - 1) << (g * i) for i, x in enumerate(byte_planes)]
            codes.copy_(reduce(torch.bitwise_or, parts)[..., : codes.shape[-1]])
        out.add_(0.5 - (1 << (self.bits - 1)))


@dataclass(frozen=True)
class Float8Format(QuantizedFormat):
    """Latent elements as float8 e4m3 with float32 scales: m / 448, with m the largest magnitude of a plane.

    An element x changes by at most |x| / 16, or by m 2^-18.8 near zero. At c = 512, r = 64 a row is the record of 656
    bytes that FlashMLA, vLLM ("fp8_ds_mla") and SGLang use: 512 codes, 4 scales, 64 rotary elements, pairs interleaved.
    """

    cache_dtype = "fp8"
    _scale_dtype = torch.float32

    @property
    def _num_code_bytes(self) -> int:
        return self.coded_width

    def _scales_of(self, largest: Tensor) -> Tensor:
        # the divisor is a tensor: a GPU would multiply by a number's reciprocal, and codes would depend on the device
        scales = largest / largest.new_full((), torch.finfo(torch.float8_e4m3fn).max)
        return scales.clamp(min=torch.finfo(torch.float32).tiny)

    def _to_code_bytes(self, scaled: Tensor) -> Tensor:
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8)

    def _from_code_bytes(self, code_bytes: Tensor, out: Tensor) -> None:
        # the bits of e4m3 are a float16 whose exponent is 8 too small; torch's own conversion is five times slower
        halves = (code_bytes.view(torch.int8).to(torch.int16) << 7 & ~0x4000).view(torch.float16)
        out.copy_(halves).mul_(2.0**8)

    def check_finite(self, rows: Tensor, name: str) -> None:
        """Refuses foreign rows with a NaN code, which `decode` would read as 480, or a scale that is not finite."""
        codes, scales = rows[..., : self._num_code_bytes], rows[..., self._scales].view(self._scale_dtype)
        if (codes & 0x7F == 0x7F).any() or not scales.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinite latents; expected finite ones, so compute them again.")


def check_cache_dtype(cache_dtype: str | None) -> None:
    if cache_dtype not in CACHE_DTYPES:
        *names, last = map(repr, CACHE_DTYPES[1:])
        raise ValueError(
            f"cache_dtype must be None (the dtype that the model computes in), {', '.join(names)} or {last}, "
            f"got {cache_dtype!r}."
        )


def refuse_unknown_options(owner: type, options: dict[str, Any]) -> None:
    """Refuses keyword arguments that `owner` does not take; for numbers of bits, the error names the right argument."""
    for name, value in options.items():
        if name in NUMBERS_OF_BITS:
            raise TypeError(
                f"{owner.__name__} takes cache_dtype, such as 'int8' or 'fp8', in place of {name}={value!r}."
            )
        known = [known for known, x in signature(owner).parameters.items() if x.kind is not Parameter.VAR_KEYWORD]
        raise unknown_argument(owner.__name__, name, known)


def latent_format(
    cache_dtype: str | None, latent_width: int, rotary_width: int, dtype: torch.dtype, num_unquantized: int = 0
) -> LatentFormat:
    check_cache_dtype(cache_dtype)
    if cache_dtype is None:
        return LatentFormat(latent_width, rotary_width, dtype)
    if cache_dtype == "fp8":
        return Float8Format(latent_width, rotary_width, dtype, num_unquantized)
    bits = int(cache_dtype.removeprefix("int"))
    return IntegerFormat(latent_width, rotary_width, dtype, num_unquantized, bits)
