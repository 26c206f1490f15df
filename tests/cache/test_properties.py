"""Any sequence of operations on a LatentCache leaves what the same sequence leaves on lists of tokens.

Letters: b batch, t tokens held, c latent width, r rotary width, h heads.
"""

import copy
import functools
import tempfile
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from deepseek_latent import LatentCache
from deepseek_latent.attention import ops as latent_ops
from deepseek_latent.cache.format import latent_format
from deepseek_latent.cache.segments import Latents, SplitSegment
from tests import reference
from tests.support import assert_within_rounding, random_ids, seeded, tiny_model

LAYERS, H, N, R, V, C = 2, 3, 5, 6, 4, 130  # two planes, the second of two elements
LARGEST_BATCH, LARGEST_LENGTH = 6, 120
# codes up to a multiple of 4, scales, 12 bytes of the rotary key
ROW_BYTES = {"int8": 148, "int6": 116, "int5": 104, "int4": 84, "fp8": 152}
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}
modes = st.sampled_from(sorted(MODES))
beginnings = st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 3), st.integers(0, 4), st.booleans(), modes)


@functools.cache
def model_of(dtype: torch.dtype):
    widths = {"hidden_size": 8, "vocab_size": 96, "q_lora_rank": None, "intermediate_size": 8}
    dense = {"n_routed_experts": None, "n_shared_experts": None, "num_hidden_layers": LAYERS}
    return tiny_model(dtype, kv_lora_rank=C, qk_rope_head_dim=R, num_attention_heads=1, **widths, **dense)


class Token(NamedTuple):
    """One token of one sequence in one layer: the latent that was stored [c], and the row that can be read [c+r]."""

    latent: Tensor
    read: Tensor


class Plain:
    """The same cache as lists: layers of sequences of tokens. `prefix` is the number of tokens stored once for all."""

    def __init__(self, cache_dtype: str | None, dtype: torch.dtype):
        self.cache_dtype, self.dtype = cache_dtype, dtype
        self.layers: list[list[list[Token]]] = [[] for _ in range(LAYERS)]
        self.prefix = 0

    @property
    def batch(self) -> int:
        return len(self.layers[0])

    @property
    def length(self) -> int:
        return len(self.layers[0][0]) if self.batch else 0

    def copy(self) -> "Plain":
        duplicate = Plain(self.cache_dtype, self.dtype)
        duplicate.layers = [[list(sequence) for sequence in layer] for layer in self.layers]
        duplicate.prefix = self.prefix
        return duplicate

    def append(self, layer: int, latent: Tensor, k_rotary: Tensor) -> None:
        self.layers[layer] = self.layers[layer] or [[] for _ in latent]
        self.dtype = latent.dtype
        stored = latent_format(self.cache_dtype, C, R, latent.dtype)
        # half precision is decoded as float32, then rounded
        read = stored.decode(stored.encode(latent[:, 0].detach(), k_rotary[:, 0].detach()), torch.float32)
        for sequence, came, reads in zip(self.layers[layer], latent[:, 0].detach(), read, strict=True):
            sequence += map(Token, came, reads)

    def crop(self, count: int) -> None:
        kept = self.length - count
        self.layers = [[sequence[:kept] for sequence in layer] for layer in self.layers]
        self.prefix = min(self.prefix, kept)

    def select(self, indices: list[int]) -> None:
        self.layers = [[list(layer[i]) for i in indices] for layer in self.layers]

    def repeat(self, repeats: int) -> None:
        if self.batch == 1:
            self.prefix = self.length
        self.layers = [[list(sequence) for sequence in layer for _ in range(repeats)] for layer in self.layers]

    def nbytes(self) -> int:
        size = (C + R) * self.dtype.itemsize if self.cache_dtype is None else ROW_BYTES[self.cache_dtype]
        return LAYERS * size * (self.prefix + self.batch * (self.length - self.prefix))

    def tensors(self, layer: int) -> tuple[Tensor, Tensor]:
        """The tensors that can be read: [b t c] and [b t r]."""
        rows = [token.read for sequence in self.layers[layer] for token in sequence]
        rows = torch.stack(rows) if rows else torch.empty(0, C + R)
        return rows.view(self.batch, self.length, C + R).to(self.dtype).split((C, R), dim=-1)

    def check_error(self, layer: int, keys: Tensor) -> None:
        """Asserts that latents [b 1 t c] are off by at most the error that formats state, and the dtype's rounding."""
        came = [torch.stack([token.latent.float() for token in sequence]) for sequence in self.layers[layer]]
        came, read = torch.stack(came).double(), keys[:, 0].double()
        largest = [x.abs().amax(-1, keepdim=True).expand_as(x) for x in came.split(128, dim=-1)]
        largest = torch.cat(largest, dim=-1)
        if self.cache_dtype is None:
            allowed = torch.zeros_like(came)
        elif self.cache_dtype == "fp8":
            allowed = torch.maximum(came.abs() / 16, largest * 2**-18.8)
        else:
            allowed = 1.008 * largest * 2.0 ** -int(self.cache_dtype.removeprefix("int"))
        if self.cache_dtype is not None and self.dtype != torch.float32:
            allowed = allowed + read.abs() * torch.finfo(self.dtype).eps
        assert ((read - came).abs() <= allowed).all()


def check(cache: LatentCache, plain: Plain) -> None:
    """Asserts that every property of a LatentCache agrees with the lists."""
    assert cache.get_seq_length() == plain.length
    assert cache.nbytes == plain.nbytes()
    if not plain.batch:
        assert all(layer.keys is None and layer.values is None for layer in cache.layers)
        assert cache.batch_size == -1
        return
    assert cache.batch_size == plain.batch
    for i, layer in enumerate(cache.layers):
        latent, k_rotary = plain.tensors(i)
        assert layer.get_seq_length() == layer.latents.num_tokens == plain.length
        assert layer.keys.dtype == layer.values.dtype == layer.dtype == plain.dtype
        assert torch.equal(layer.keys, latent[:, None])
        assert torch.equal(layer.values, k_rotary[:, None])
        assert layer.allocated_nbytes >= layer.nbytes
        if plain.length:
            plain.check_error(i, layer.keys)


class CacheMachine(RuleBasedStateMachine):
    cache_dtype: str | None

    @initialize(dtype=st.sampled_from([torch.bfloat16, torch.float32]), begin=beginnings)
    def make(self, dtype, begin):
        self.folder = tempfile.TemporaryDirectory()
        self.steps = 0
        self.cache = LatentCache(model_of(dtype).config, cache_dtype=self.cache_dtype)
        self.plain = Plain(self.cache_dtype, dtype)
        self.bystanders: list[tuple[LatentCache, Plain]] = []
        self.saved: list[tuple[Path, Plain]] = []
        self.losses: list[Tensor] = []
        self.begin(*begin)

    def begin(self, b: int, s: int, repeats: int, more: int, in_float32: bool, mode: str) -> None:
        """A prompt, often of one sequence that is repeated, and sometimes continued by a model of a wider dtype."""
        self.feed(b, s, mode)
        with MODES[mode]():
            self.cache.batch_repeat_interleave(repeats)
        self.plain.repeat(repeats)
        self.feed(b * repeats, more, mode)
        if in_float32:
            self.plain.dtype = torch.float32
            self.feed(b * repeats, 1, mode)

    def new_tokens(self, b: int, s: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer [b 1 s c] and [b 1 s r]; the magnitudes of tokens differ."""
        self.steps += 1
        generator = seeded(self.steps)
        sizes = torch.rand(LAYERS, b, 1, s, 1, generator=generator) * 4
        x = torch.randn(LAYERS, b, 1, s, C + R, generator=generator) * sizes
        return [layer.to(self.plain.dtype).split((C, R), dim=-1) for layer in x]

    def feed(self, b: int, s: int, mode: str, needs_gradient: bool = False) -> None:
        with MODES[mode]():
            for i, (latent, k_rotary) in enumerate(self.new_tokens(b, s)):
                if needs_gradient:
                    latent, k_rotary = latent.clone().requires_grad_(), k_rotary.clone().requires_grad_()
                keys, values = self.cache.update(latent, k_rotary, i)
                self.plain.append(i, latent, k_rotary)
                assert keys.shape == (b, 1, len(self.plain.layers[i][0]), C)
                assert values.shape == (*keys.shape[:3], R)
                if needs_gradient:
                    self.losses.append((keys**2).sum() + (values**3).sum())

    @precondition(lambda self: self.plain.length < LARGEST_LENGTH)
    @rule(s=st.sampled_from([0, 2, 5, 70]), mode=modes)
    def update(self, s, mode):
        self.feed(self.plain.batch, s, mode)

    @precondition(lambda self: self.plain.length < LARGEST_LENGTH)
    @rule(count=st.integers(1, 3), mode=modes)
    def update_token_by_token(self, count, mode):
        for _ in range(count):
            self.feed(self.plain.batch, 1, mode)

    @rule(count=st.integers(1, 3), mode=modes)
    def replace_the_last(self, count, mode):
        # as a model rejects candidates: the next tokens overwrite their rows
        count = min(count, self.plain.length)
        self.cache.crop(-count)
        self.plain.crop(count)
        self.feed(self.plain.batch, count, mode)

    @precondition(lambda self: self.cache_dtype is None and self.plain.length < LARGEST_LENGTH)
    @rule(s=st.integers(1, 3), replaced=st.integers(0, 2), mode=modes)
    def update_with_gradients(self, s, replaced, mode):
        self.feed(self.plain.batch, s, "grad", needs_gradient=True)
        if replaced:
            self.replace_the_last(replaced, mode)

    @rule(data=st.data(), mode=modes)
    def crop(self, data, mode):
        length, own = self.plain.length, self.plain.length - self.plain.prefix
        # also just before, at and after the end of the shared prefix
        counts = {1, 2, own - 1, own, own + 1, length // 2, length, 0}
        count = data.draw(st.sampled_from([count for count in counts if 0 <= count <= length]))
        with MODES[mode]():
            self.cache.crop(-count)
        self.plain.crop(count)

    @rule(data=st.data(), mode=modes, name=st.sampled_from(["reorder_cache", "batch_select_indices"]))
    def select(self, data, mode, name):
        indices = st.lists(st.integers(0, self.plain.batch - 1), min_size=1, max_size=LARGEST_BATCH)
        indices = data.draw(indices)
        with MODES[mode]():
            getattr(self.cache, name)(torch.tensor(indices))
        self.plain.select(indices)

    @rule(data=st.data(), mode=modes)
    def select_by_booleans(self, data, mode):
        b = self.plain.batch
        kept = data.draw(st.lists(st.booleans(), min_size=b, max_size=b).filter(any))
        with MODES[mode]():
            self.cache.batch_select_indices(torch.tensor(kept))
        self.plain.select([i for i, keep in enumerate(kept) if keep])

    @precondition(lambda self: self.plain.batch <= LARGEST_BATCH // 2)
    @rule(repeats=st.integers(1, 3), mode=modes)
    def repeat(self, repeats, mode):
        if self.plain.batch * repeats > LARGEST_BATCH:
            return
        with MODES[mode]():
            self.cache.batch_repeat_interleave(repeats)
        self.plain.repeat(repeats)

    @rule(begin=beginnings)
    def reset_and_begin_anew(self, begin):
        with MODES[begin[-1]]():
            self.cache.reset()
        self.plain = Plain(self.cache_dtype, self.plain.dtype)
        check(self.cache, self.plain)
        self.begin(*begin)

    @rule(mode=modes)
    def offload_and_prefetch(self, mode):
        with MODES[mode]():
            for layer in self.cache.layers:
                layer.offload()
                layer.prefetch()

    # torch refuses to deep-copy a tensor with a gradient history, whatever holds it
    @precondition(lambda self: not self.in_graph())
    @rule(continue_with_the_copy=st.booleans())
    def deepcopy(self, continue_with_the_copy):
        duplicate = copy.deepcopy(self.cache)
        if continue_with_the_copy:
            self.cache, duplicate = duplicate, self.cache
        self.bystanders.append((duplicate, self.plain.copy()))

    @precondition(lambda self: self.plain.length)
    @rule(mode=modes)
    def save_and_load(self, mode):
        model = model_of(self.plain.dtype)
        path = Path(self.folder.name, f"{len(self.saved)}.safetensors")
        tokens = random_ids(self.plain.batch, self.plain.length, seed=self.steps)
        self.bystanders.append((self.cache, self.plain.copy()))
        with MODES[mode]():
            self.cache.save(path, tokens=tokens, model=model)
            self.cache = LatentCache.load(path, model=model)
        assert torch.equal(self.cache.stored_tokens, tokens)
        # a single sequence is stored as a prefix that several can share
        if self.plain.batch == 1:
            self.plain.prefix = self.plain.length
        self.saved.append((path, self.plain.copy()))

    @precondition(lambda self: self.plain.length > 1)
    @rule(
        s=st.integers(1, 2),
        layer=st.integers(0, LAYERS - 1),
        tokens_per_block=st.sampled_from([1, 3, 64]),
        elements_per_block=st.sampled_from([1, 1 << 25]),
    )
    def attend(self, s, layer, tokens_per_block, elements_per_block):
        b, dtype, latents = self.plain.batch, self.plain.dtype, self.cache.layers[layer].latents
        generator = seeded(self.steps)
        q_content, q_rotary = torch.randn(b, s, H, N + R, generator=generator).to(dtype).split((N, R), dim=-1)
        w_uk, w_uv = (torch.randn(H, N + V, C, generator=generator) * C**-0.5).to(dtype).split((N, V), dim=1)
        scale = (N + R) ** -0.5
        up = (latent_ops.UpProjection(w_uk), latent_ops.UpProjection(w_uv))
        latent, k_rotary = self.plain.tensors(layer)
        blocks = {"TOKENS_PER_BLOCK": tokens_per_block, "ELEMENTS_PER_BLOCK": elements_per_block}
        with torch.no_grad(), patch.multiple(latent_ops, **blocks):
            actual = latent_ops.absorbed_attention(q_content, q_rotary, latents, *up, mask=None, scale=scale)
        plain = Latents(SplitSegment(latent, k_rotary))
        with torch.no_grad():
            yardstick = latent_ops.expanded_attention(q_content, q_rotary, plain, *up, mask=None, scale=scale)
        visible = torch.ones(b, s, self.plain.length, dtype=torch.bool).tril(self.plain.length - s)
        truth = reference.absorbed_attention(q_content, q_rotary, latent, k_rotary, w_uk, w_uv, visible, scale)
        assert_within_rounding(actual, truth, yardstick, slack=4.0)

    def in_graph(self) -> bool:
        rows = [layer._buffer for layer in self.cache.layers] + [layer._prefix for layer in self.cache.layers]
        return any(x is not None and x.requires_grad for x in rows)

    @invariant()
    def cache_and_lists_agree(self):
        check(self.cache, self.plain)

    def teardown(self):
        if not hasattr(self, "folder"):
            return
        with self.folder:
            # copies and files that were made before have not changed
            for cache, plain in self.bystanders:
                check(cache, plain)
            for path, plain in self.saved:
                check(LatentCache.load(path, model=model_of(plain.dtype)), plain)
            # raises if a tensor that autograd saved was overwritten
            for loss in self.losses:
                loss.backward(retain_graph=True)


# rows of bytes move in the same way for every format, so each one gets few sequences, which differ between formats
@pytest.mark.parametrize("cache_dtype", [None, "int8", "int6", "int5", "int4", "fp8"], ids=str)
def test_any_sequence_of_operations_has_the_result_that_it_has_on_lists_of_tokens(cache_dtype):
    machine = seed(f"cache_dtype {cache_dtype}")(type("Machine", (CacheMachine,), {"cache_dtype": cache_dtype}))
    few = settings(
        deadline=None,
        database=None,
        max_examples=40 if cache_dtype is None else 12,
        stateful_step_count=20,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=few)
