"""Calls of the operators with random arguments, right ones and wrong ones, and a judge of what came of them.

A call is the operator's name and its arguments by name. A change takes a tensor and the randomness, and gives a tensor
that the operator may refuse or must compute with; only `judge` says which, by what torch computes in float64.
"""

import copy
import random
from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_latent.cache.format import latent_format

from .operator_references import REFERENCES

FLOATS = (torch.bfloat16, torch.float32)
DTYPES = (*FLOATS, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)
SIZES = (1, 2, 3, 5, 8, 9, 16, 17, 33, 40, 64, 70, 130)
NO_MEMORY = "can't allocate memory"
Arguments = dict[str, object]


class Drawing:
    """Draws right arguments. One axis in fifty is empty."""

    def __init__(self, source: random.Random):
        self.source, self.generator = source, torch.Generator().manual_seed(source.getrandbits(40))
        self.dtype = source.choice(FLOATS)
        self.kind = source.choice(["plain", "plain", "rows", "groups"])

    def size(self, most: int = 130) -> int:
        if self.source.random() < 0.02:
            return 0
        return self.source.choice([size for size in SIZES if size <= most])

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(dtype or self.dtype)

    def weight(self, *shape: int) -> tuple[Tensor, Tensor | None]:
        """A weight, and scales if it is in int8; all weights of a call are of one kind."""
        if self.kind == "plain":
            return self.floats(*shape), None
        codes, groups = torch.randint(-127, 128, shape, dtype=torch.int8, generator=self.generator), 1
        if self.kind == "groups" and shape[-1]:
            groups = self.source.choice([n for n in range(1, shape[-1] + 1) if shape[-1] % n == 0])
        scales = self.floats(*shape[:-1], groups, dtype=self.source.choice(FLOATS)).abs() / 40
        return codes, scales[..., 0].contiguous() if groups == 1 and self.source.random() < 0.5 else scales

    def weights(self, *shapes: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        weights, scales = zip(*(self.weight(*shape) for shape in shapes))
        return list(weights), [] if scales[0] is None else list(scales)

    def angles(self, b: int, s: int, r: int) -> dict[str, Tensor]:
        angles = self.floats(self.source.choice([1, b]), s, r // 2, dtype=torch.float32) * 10
        return {"cos": angles.cos(), "sin": angles.sin()}

    def linear(self) -> Arguments:
        m, k = self.source.choice([self.size(), 257, 300]), self.size()
        weight, scales = self.weight(self.size(), k)
        return {"x": self.floats(m, k), "weight": weight, "scales": scales}

    def grouped(self) -> Arguments:
        e, m, k = self.size(9), self.source.choice([self.size(), 300]), self.size()
        ends = sorted(self.source.randint(0, m) for _ in range(e))
        weight, scales = self.weight(e, self.size(), k)
        return {
            "x": self.floats(m, k),
            "weight": weight,
            "ends": torch.tensor(ends, dtype=torch.int32),
            "scales": scales,
        }

    def absorb(self) -> Arguments:
        h, n = self.size(9), self.size(40)
        return {"x": self.floats(self.size(17), h, n), "w": self.floats(h, n, self.size())}

    def expand(self) -> Arguments:
        h, c = self.size(9), self.size()
        return {"x": self.floats(self.size(), h, c, dtype=torch.float32), "w": self.floats(h, self.size(70), c)}

    def rms_norm(self) -> Arguments:
        d = self.size()
        x = self.floats(*(self.size(9) for _ in range(self.source.randint(0, 3))), d)
        return {"x": x, "weight": self.floats(d), "eps": 1e-5}

    def rotate(self) -> Arguments:
        b, s, r = self.size(3), self.size(40), 2 * self.size(33)
        heads = self.source.choice([(), (self.size(5),)])
        return {"x": self.floats(b, s, *heads, r), **self.angles(b, s, r)}

    def project(self) -> Arguments:
        b, s = self.source.choice([(1, 1), (1, 5), (2, 4), (8, 1), (0, 3)])
        a, d, c, r, n, h = self.size(), self.size(), self.size(), 2 * self.size(9), self.size(), self.size(5)
        (q, kv_a), scales = self.weights((h * (n + r), a), (c + r, d))
        q_scales, kv_a_scales = scales or (None, None)
        return {
            "q_x": self.floats(b, s, a),
            "q": q,
            "q_scales": q_scales,
            "x": self.floats(b, s, d),
            "kv_a": kv_a,
            "kv_a_scales": kv_a_scales,
            "norm": self.floats(c),
            "eps": 1e-5,
            **self.angles(b, s, r),
            "head_width": max(n + r, 1),
        }

    def mlp(self) -> Arguments:
        d, f = self.size(), self.source.choice([self.size(), 1100])
        weights, scales = self.weights((f, d), (f, d), (d, f))
        return {"x": self.floats(self.source.choice([self.size(), 300]), d), "weights": weights, "scales": scales}

    def experts(self) -> Arguments:
        m, d, f, e, k, g = self.size(), self.size(), self.size(70), self.size(9), self.size(9), self.size()
        (gate_up, down), scales = self.weights((e, 2 * f, d), (e, d, f))
        shared, shared_scales = self.weights((g, d), (g, d), (d, g)) if self.source.random() < 0.5 else ([], [])
        # one past the last expert belongs to another rank, and a token may choose an expert twice
        chosen = torch.randint(0, e + 1, (m, k), generator=self.generator)
        return {
            "x": self.floats(m, d),
            "gate_up": gate_up,
            "down": down,
            "chosen": chosen,
            "shares": self.floats(m, k, dtype=torch.float32),
            "scales": scales,
            "shared": shared,
            "shared_scales": shared_scales,
        }

    def attend(self) -> Arguments:
        return self._attention(*(self.size(most) for most in (3, 9, 17)), c=self.size(), absorbed=True)

    def attention(self) -> Arguments:
        b, s, h, c, n = self.size(3), self.size(9), self.size(9), self.size(), self.size(40)
        projections = {"w_uk": self.floats(h, n, c), "w_uv": self.floats(h, self.size(40), c)}
        return {"q_content": self.floats(b, s, h, n), **projections, **self._attention(b, s, h, c=c)}

    def _attention(self, b: int, s: int, h: int, *, c: int, absorbed: bool = False) -> Arguments:
        r, bits = self.size(16), self.source.choice(["", "", "8", "6", "5", "4", "fp8"])
        num_unquantized = 2 * self.size((c - 1) // 2) if bits and c > 2 and self.source.random() < 0.5 else 0
        lengths = [self.source.choice([0, 1, 2, 47, 48, 49, 130, 500]) for _ in range(self.source.randint(1, 3))]
        latents, keys = [], []
        for length in lengths:
            batch = self.source.choice([1, b])
            latent, key = self.floats(batch, length, c), self.floats(batch, length, r)
            if bits and c:
                cache_dtype = "fp8" if bits == "fp8" else f"int{bits}"
                rows_format = latent_format(cache_dtype, c, r, torch.bfloat16, num_unquantized)
                rows, num_bytes = rows_format.encode(latent, key), 2 * (num_unquantized + r)
                key = torch.cat((latent[..., c - num_unquantized :], key), dim=-1).bfloat16()
                latent = rows[..., : -num_bytes or None].contiguous()
            latents.append(latent)
            keys.append(key)
        arguments = {
            "q_rotary": self.floats(b, s, h, r),
            "latents": latents,
            "rotary_keys": keys,
            "scale": c**-0.5 if c else 1.0,
            "mask": None,
            "bits": bits if c else "",
        }
        if self.source.random() < 0.5:
            shown = torch.rand(self.source.choice([1, b]), self.source.choice([1, h]), s, sum(lengths)) < 0.7
            arguments["mask"] = torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)
        return arguments | ({"absorbed": self.floats(b, s, h, c, dtype=torch.float32)} if absorbed else {})


def draw(operator: str, source: random.Random) -> Arguments:
    return getattr(Drawing(source), operator)()


# changes of a tensor


def longer(x: Tensor, source: random.Random) -> Tensor:
    axis = source.randrange(x.dim())
    return torch.cat((x, x.narrow(axis, 0, min(1, x.shape[axis]))), dim=axis)


def shorter(x: Tensor, source: random.Random) -> Tensor:
    axis = source.choice([axis for axis in range(x.dim()) if x.shape[axis]])
    return x.narrow(axis, 0, x.shape[axis] - 1).contiguous()


def empty(x: Tensor, source: random.Random) -> Tensor:
    return x.narrow(source.randrange(x.dim()), 0, 0).contiguous()


def one_axis_more(x: Tensor, source: random.Random) -> Tensor:
    return x.unsqueeze(source.randint(0, x.dim()))


def one_axis_less(x: Tensor, source: random.Random) -> Tensor:
    return x.select(source.randrange(x.dim()), 0).contiguous()


def flattened(x: Tensor, source: random.Random) -> Tensor:
    return x.flatten()


def transposed(x: Tensor, source: random.Random) -> Tensor:
    return x.mT


def lying_transposed(x: Tensor, source: random.Random) -> Tensor:
    return x.mT.contiguous().mT


def every_second(x: Tensor, source: random.Random) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def inside_wider(x: Tensor, source: random.Random) -> Tensor:
    wide = torch.cat((x, x), dim=-1)
    return wide[..., : x.shape[-1]] if source.random() < 0.5 else wide[..., x.shape[-1] :]


def expanded_first_axis(x: Tensor, source: random.Random) -> Tensor:
    return x[:1].expand(x.shape)


def expanded_last_axis(x: Tensor, source: random.Random) -> Tensor:
    return x[..., :1].expand(x.shape)


def one_element(x: Tensor, source: random.Random) -> Tensor:
    return x.flatten()[0].expand(x.shape)


def endless(x: Tensor, source: random.Random) -> Tensor:
    return x[:1].expand(1 << 50, *x.shape[1:])


def of_another_dtype(x: Tensor, source: random.Random) -> Tensor:
    x = x.abs() if x.is_complex() else x
    return x.to(source.choice([dtype for dtype in DTYPES if dtype != x.dtype]))


def complex_numbers(x: Tensor, source: random.Random) -> Tensor:
    return x.to(torch.complex64).conj()


def lazily_negated(x: Tensor, source: random.Random) -> Tensor:
    return (-x)._neg_view()


def on_meta(x: Tensor, source: random.Random) -> Tensor:
    return x.to("meta")


def sparse(x: Tensor, source: random.Random) -> Tensor:
    return x.to_sparse()


def wants_gradient(x: Tensor, source: random.Random) -> Tensor:
    return x.clone().requires_grad_()


def misaligned(x: Tensor, source: random.Random) -> Tensor:
    memory = bytearray(1) + bytes(x.contiguous().view(torch.uint8).flatten().tolist())
    return torch.frombuffer(memory, dtype=x.dtype, offset=1).view(x.shape)


def wild_numbers(x: Tensor, source: random.Random) -> Tensor:
    """Indices where there are none: below 0, past the last, out of order."""
    x = x.clone()
    limits = torch.iinfo(x.dtype)
    for _ in range(source.randint(1, 3)):
        x.view(-1)[source.randrange(x.numel())] = source.choice([-1, -2, 0, 1, 7, 1 << 20, limits.min, limits.max])
    return x


CHANGES: tuple[Callable[[Tensor, random.Random], Tensor], ...] = (
    longer, shorter, empty, one_axis_more, one_axis_less, flattened, transposed, lying_transposed, every_second,
    inside_wider, expanded_first_axis, expanded_last_axis, one_element, endless, of_another_dtype, complex_numbers,
    lazily_negated, on_meta, sparse, wants_gradient, misaligned, wild_numbers,
)  # fmt: skip


def places_of(arguments: Arguments) -> list[tuple[str, int | None]]:
    """Where tensors are: an argument, or an argument and the place in its list."""
    places = []
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            places.append((name, None))
        elif isinstance(value, list):
            places += [(name, i) for i in range(len(value))]
    return places


def changed(
    arguments: Arguments, place: tuple[str, int | None], change: Callable, source: random.Random
) -> Arguments | None:
    """The arguments with one tensor changed; None if that tensor cannot be changed so."""
    name, i = place
    arguments = {key: [*value] if isinstance(value, list) else value for key, value in arguments.items()}
    tensor = arguments[name] if i is None else arguments[name][i]
    if not isinstance(tensor, Tensor) or tensor.numel() > 1 << 30:
        return None
    try:
        tensor = change(tensor, source)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return None
    if i is None:
        arguments[name] = tensor
    else:
        arguments[name][i] = tensor
    return arguments


def with_other_options(arguments: Arguments, source: random.Random) -> Arguments:
    """The arguments with a list of another length, an optional tensor more or less, or another number or name."""
    arguments, name = copy.copy(arguments), source.choice([*arguments])
    value = arguments[name]
    if isinstance(value, list):
        arguments[name] = source.choice([[], value[1:], value + value[-1:], value[::-1]])
    elif name == "bits":
        arguments[name] = source.choice(["", "3", "7", "88", "fp", "fp8", "8", "4", "-", "\0", "int8"])
    elif name == "head_width":
        arguments[name] = source.choice([0, -1, 1, value + 1, -value, 1 << 62, -(1 << 63)])
    elif value is None:
        arguments[name] = torch.ones(source.choice([(1,), (3, 1), (1, 1, 1, 1)]))
    elif isinstance(value, Tensor) and ("scales" in name or name == "mask"):
        arguments[name] = None
    return arguments


# beyond it, sums of products in float32 may have overflowed on the way
LARGEST_COMPARED = 1e15


def judge(operator: str, arguments: Arguments) -> str:
    """ "right", "refused", or what is wrong with what the operator made of these arguments."""
    try:
        results = getattr(torch.ops.deepseek_latent, operator)(**arguments)
    except (ValueError, RuntimeError) as error:
        return "refused" if is_clear(error) else f"raw exception: {type(error).__name__}: {str(error)[:200]}"
    except Exception as error:
        return f"raw exception: {type(error).__name__}: {str(error)[:200]}"
    try:
        expected = REFERENCES[operator](**arguments)
    except Exception as error:
        # the operator need not make what the reference makes of a huge expanded tensor
        if NO_MEMORY in str(error) or "size calculation" in str(error):
            return "right"
        return f"wrong answer: it takes what torch refuses with {type(error).__name__}: {str(error)[:200]}"
    pairs = zip(results, expected) if isinstance(results, tuple) else [(results, expected)]
    return next((wrong for result, exact in pairs if (wrong := _difference(result, exact))), "right")


def is_clear(error: Exception) -> bool:
    """True if an operator refused its arguments in a sentence, or torch did before it came to the operator."""
    text = str(error)
    if isinstance(error, ValueError):
        return text.startswith("expected ") and any(words in text for words in ("got ", "copy it", "torch.no_grad"))
    # another kind of tensor; a type that the schema does not have; a size that no memory has
    known = ("Could not run 'deepseek_latent::", "Expected a value of type", "size calculation", NO_MEMORY)
    return any(words in text for words in known)


def _difference(result: Tensor, exact: Tensor) -> str | None:
    if result.shape != exact.shape:
        return f"wrong answer: sizes {[*result.shape]}, expected {[*exact.shape]}"
    if result.is_meta or exact.is_meta:
        return None
    error = (result.double() - exact).norm()
    if not exact.norm() < LARGEST_COMPARED:
        return None
    # operators sum in float32 and round to bfloat16, some of them twice
    allowed = (0.02 if result.dtype == torch.bfloat16 else 1e-3) * exact.norm() + 1e-6
    return None if error <= allowed else f"wrong answer: error {error:.2e} where {allowed:.2e} is rounding"
