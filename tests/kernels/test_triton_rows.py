"""The Triton kernels of norms, cached rows and the router, on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import os

import pytest
import torch
from torch import nn

from deepseek_latent import DeepseekV2Config
from deepseek_latent.attention.rotary import rotate
from deepseek_latent.cache.format import latent_format
from deepseek_latent.experts.router import DeepseekV2MoEGate

pytest.importorskip("triton")
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"
if DEVICE == "cpu" and not IS_INTERPRETED:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from deepseek_latent.kernels.gpu.triton_norm import add_rms_norm, rms_norm  # noqa: E402
from deepseek_latent.kernels.gpu.triton_router import choose, multiplied_logits, route, split_logits  # noqa: E402
from deepseek_latent.kernels.gpu.triton_write import norm_rotate, norm_rotate_write  # noqa: E402

EPS = 1e-6


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def random(*shape, dtype=torch.float32, seed=0):
    """Random numbers whose scale grows along the last axis."""
    generator = torch.Generator().manual_seed(seed)
    slope = torch.linspace(0.5, 2.0, shape[-1])
    return (torch.randn(*shape, generator=generator) * slope).to(DEVICE, dtype)


def within_a_rounding(out, exact):
    """Asserts an error within half a unit in the last place, plus the error of float32 sums."""
    error = (out.double() - exact).abs()
    budget = exact.abs() * (torch.finfo(out.dtype).eps * 0.5 + 1e-6) + torch.finfo(out.dtype).tiny
    assert out.isfinite().all()
    assert (error <= budget).all(), (error / budget).max()


def exact_norm(x, weight):
    return nn.functional.rms_norm(x.double(), weight.shape, weight.double(), EPS)


@DTYPES
@pytest.mark.parametrize(("m", "d"), [(1, 72), (3, 129), (5, 8)], ids=str)
def test_sum_is_torchs_and_norm_is_of_the_rounded_sum(m, d, dtype):
    x, residual, weight = random(m, d, dtype=dtype), random(m, d, dtype=dtype, seed=1), random(d, dtype=dtype, seed=2)
    total, normed = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    within_a_rounding(normed, exact_norm(x + residual, weight))


@DTYPES
def test_norm_reads_rows_of_a_view_and_nothing_around_them(dtype):
    memory = torch.full((2, 3, 80), float("nan"), device=DEVICE, dtype=dtype)
    memory[:, -1, :72] = random(2, 72, dtype=dtype)
    x, weight = memory[:, -1:, :72], random(72, dtype=dtype, seed=1)
    normed = rms_norm(x, weight, EPS)
    assert normed.shape == (2, 1, 72)
    within_a_rounding(normed, exact_norm(x, weight))


def test_norm_of_zeros_is_zeros_and_norm_of_no_rows_has_no_rows():
    weight = random(24)
    assert torch.equal(rms_norm(torch.zeros(2, 24, device=DEVICE), weight, EPS), torch.zeros(2, 24, device=DEVICE))
    assert add_rms_norm(*[torch.zeros(0, 24, device=DEVICE)] * 2, weight, EPS)[1].shape == (0, 24)


class Layer:
    """Inputs of one attention layer; `queries` and `compressed` are views with NaN around them."""

    def __init__(self, b, s, dtype, h=3, n=16, r=8, c=40, one_position_for_all=False):
        self.n, self.r, self.c = n, r, c
        self.projected = torch.full((b, s, h * (n + r) + 8), float("nan"), device=DEVICE, dtype=dtype)
        self.projected[..., :-8] = random(b, s, h * (n + r), dtype=dtype)
        self.queries = self.projected[..., :-8].unflatten(-1, (h, n + r))
        self.compressed = torch.full((b, s, c + r + 8), float("nan"), device=DEVICE, dtype=dtype)[..., : c + r]
        self.compressed[:] = random(b, s, c + r, dtype=dtype, seed=1)
        self.weight = random(c, dtype=dtype, seed=2)
        angles = random(1 if one_position_for_all else b, s, r // 2, seed=3) * 9
        self.cos, self.sin = angles.cos(), angles.sin()

    def arguments(self):
        return self.queries, self.compressed, self.weight, EPS, self.cos, self.sin

    def expected(self):
        """Rotated queries, latents and rotated keys, in float64."""
        double = [x.double() for x in (self.queries[..., self.n :], self.compressed[..., self.c :])]
        rotated = [exact_rotation(x, self.cos.double(), self.sin.double()) for x in double]
        queries = torch.cat((self.queries[..., : self.n].double(), rotated[0]), dim=-1)
        return queries, exact_norm(self.compressed[..., : self.c], self.weight), rotated[1]


def exact_rotation(x, cos, sin):
    per_token = cos.shape[:2] + (1,) * (x.dim() - 3) + cos.shape[2:]
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.complex(cos, sin).view(per_token)
    return torch.view_as_real(turned).flatten(-2)


def close(out, exact):
    """A rotation may cancel, so errors are measured by the largest element."""
    error = (out.double() - exact).abs().max()
    assert error <= exact.abs().max() * (torch.finfo(out.dtype).eps + 1e-6)


@DTYPES
@pytest.mark.parametrize("one_position_for_all", [False, True], ids=["positions", "one_position"])
@pytest.mark.parametrize(("b", "s", "h", "r", "c"), [(1, 1, 3, 8, 40), (2, 3, 17, 12, 300)], ids=str)
def test_norm_rotate_gives_latents_keys_and_turned_queries(b, s, h, r, c, one_position_for_all, dtype):
    layer = Layer(b, s, dtype, h=h, r=r, c=c, one_position_for_all=one_position_for_all)
    queries, latent, k_rotary = layer.expected()
    plain = rotate(layer.queries[..., layer.n :], layer.cos, layer.sin)
    out = norm_rotate(*layer.arguments())
    within_a_rounding(out[0], latent)
    close(out[1], k_rotary)
    close(layer.queries, queries)
    assert torch.equal(layer.queries[..., layer.n :], plain)
    assert torch.equal(out[1], rotate(layer.compressed[..., layer.c :], layer.cos, layer.sin))
    assert layer.projected[..., -8:].isnan().all()


@pytest.mark.parametrize("on_device", [True, False], ids=["tensor", "int"])
@pytest.mark.parametrize("start", [0, 5, 8], ids="start{}".format)
@pytest.mark.parametrize("bits", [None, 8, 4], ids="bits{}".format)
@pytest.mark.parametrize("c", [40, 129, 300, 512], ids="c{}".format)
def test_rows_are_those_of_the_format_and_no_other_row_changes(c, bits, start, on_device):
    dtype = torch.bfloat16
    layer, again = Layer(2, 3, dtype, c=c), Layer(2, 3, dtype, c=c)
    format = latent_format(bits and f"int{bits}", c, layer.r, dtype)
    memory = torch.full((2, 12, format.row_width), 77, device=DEVICE, dtype=format.storage_dtype)
    rows, before = memory[:, 1:], memory.clone()
    first = torch.tensor(start, device=DEVICE) if on_device else start
    norm_rotate_write(*layer.arguments(), rows, first, bits=bits)
    latent, k_rotary = norm_rotate(*again.arguments())
    before[:, 1 + start : 4 + start] = format.encode(latent, k_rotary)
    assert torch.equal(memory, before)
    assert torch.equal(layer.queries, again.queries)


@DTYPES
@pytest.mark.parametrize("bits", [8, 4], ids="bits{}".format)
@pytest.mark.parametrize(("c", "u"), [(88, 8), (144, 8), (9, 6), (135, 6), (136, 8)], ids=str)
def test_rows_with_unquantized_channels_are_those_of_the_format(c, u, bits, dtype):
    layer, again = (Layer(2, 3, dtype, c=c) for _ in range(2))
    format = latent_format(f"int{bits}", c, layer.r, dtype, u)
    memory = torch.full((2, 9, format.row_width), 77, device=DEVICE, dtype=torch.uint8)
    before = memory.clone()
    norm_rotate_write(*layer.arguments(), memory[:, 1:], 4, bits=bits, num_unquantized=u)
    before[:, 5:8] = format.encode(*norm_rotate(*again.arguments()))
    assert torch.equal(memory, before)
    assert torch.equal(layer.queries, again.queries)


@pytest.mark.parametrize("bits", [8, 4], ids="bits{}".format)
def test_latents_of_zeros_and_of_one_large_element_get_the_codes_of_the_format(bits):
    layer = Layer(1, 2, torch.bfloat16, c=300)
    layer.compressed[0, 0] = 0
    layer.compressed[0, 1, :300] = 0
    layer.compressed[0, 1, 128:130] = torch.tensor([3e4, -3e4])
    format = latent_format(f"int{bits}", 300, layer.r, torch.bfloat16)
    rows = torch.full((1, 2, format.row_width), 77, device=DEVICE, dtype=torch.uint8)
    norm_rotate_write(*layer.arguments(), rows, 0, bits=bits)
    assert torch.equal(rows, format.encode(*norm_rotate(*layer.arguments())))


def test_rows_past_the_end_of_the_buffer_are_not_written():
    layer = Layer(1, 3, torch.float32)
    memory = torch.full((1, 6, layer.c + layer.r), 77.0, device=DEVICE)
    norm_rotate_write(*layer.arguments(), memory[:, :4], torch.tensor([3], device=DEVICE))
    assert (memory[:, 3] != 77).all()
    assert (memory[:, 4:] == 77).all()


def gate(e, k, n_group=1, topk_group=1, normalize=False, d=72):
    config = DeepseekV2Config(
        hidden_size=d,
        n_routed_experts=e,
        num_experts_per_tok=k,
        topk_method="group_limited_greedy" if n_group > 1 else "greedy",
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=normalize,
        routed_scaling_factor=16.0 if not normalize else 1.0,
    )
    module = DeepseekV2MoEGate(config).to(DEVICE).requires_grad_(False)
    module.weight.copy_(random(e, d, seed=5) * 0.1)
    return module


def routed(module, x):
    return route(
        x,
        module.weight,
        module.num_experts_per_tok,
        module.n_group if module.is_grouped else 1,
        module.topk_group if module.is_grouped else 1,
        normalize=module.normalizes_gates,
        scaling_factor=module.routed_scaling_factor,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 2, 7, 17], ids="m{}".format)
@pytest.mark.parametrize(
    "options",
    [
        {"e": 12, "k": 3},
        {"e": 64, "k": 6, "normalize": True},
        {"e": 12, "k": 3, "n_group": 4, "topk_group": 2},
        {"e": 20, "k": 5, "n_group": 4, "topk_group": 1, "d": 1100},
        {"e": 160, "k": 6, "n_group": 8, "topk_group": 3},
    ],
    ids=str,
)
def test_route_chooses_as_the_gate(options, m, dtype):
    module = gate(**options).to(dtype)
    x = random(m, module.weight.shape[1], dtype=dtype)
    logits, weights, experts = routed(module, x)
    exact = x.double() @ module.weight.double().T
    # sums that cancel are measured against the sum of magnitudes
    budget = 1e-6 * (x.double().abs() @ module.weight.double().abs().T)
    assert ((logits - exact).abs() <= budget).all()
    expected_weights, expected = module.choose(logits)
    assert torch.equal(experts.sort(dim=-1).values, expected.sort(dim=-1).values)
    by_expert = expected_weights.gather(-1, expected.argsort(dim=-1))
    torch.testing.assert_close(weights.gather(-1, experts.argsort(dim=-1)), by_expert, rtol=1e-5, atol=1e-9)
    assert (weights.diff(dim=-1) <= 1e-6 * weights[:, :1]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [33, 515], ids="m{}".format)
def test_many_tokens_get_the_same_logits_from_matrix_units(m, dtype):
    memory = torch.full((m + 2, 312), float("nan"), device=DEVICE, dtype=dtype)
    memory[:m, :300] = random(m, 300, dtype=dtype)
    x, weight = memory[:m, :300], random(70, 300, dtype=dtype, seed=1)
    exact = x.double() @ weight.double().T
    budget = 1e-6 * (x.double().abs() @ weight.double().abs().T)
    assert ((multiplied_logits(x, weight) - exact).abs() <= budget).all()
    assert ((split_logits(x[:33], weight) - exact[:33]).abs() <= budget[:33]).all()


def test_route_reads_nothing_around_its_inputs():
    module = gate(e=12, k=3)
    memory = torch.full((5, 80), float("nan"), device=DEVICE)
    memory[1:4, :72] = random(3, 72)
    logits, weights, experts = routed(module, memory[1:4, :72])
    assert logits.isfinite().all()
    assert weights.isfinite().all()
    assert torch.equal(experts, routed(module, memory[1:4, :72].contiguous())[2])


def test_lowest_expert_wins_a_tie_and_lowest_group_too():
    logits = torch.zeros(2, 12, device=DEVICE)
    logits[1, 7] = 1.0
    choice = {"normalize": False, "scaling_factor": 1.0}
    assert choose(logits, 3, 1, 1, **choice)[1].tolist() == [[0, 1, 2], [7, 0, 1]]
    assert choose(logits, 4, 4, 2, **choice)[1].tolist() == [[0, 1, 2, 3], [7, 0, 1, 2]]


def test_kept_groups_are_those_of_the_best_single_expert():
    logits = torch.tensor([[1.0, 1, 1, 0, 2, 0, 0.9, 0.9, 0.9]], device=DEVICE)
    _, experts = choose(logits, 3, 3, 1, normalize=False, scaling_factor=1.0)
    assert experts.tolist() == [[4, 3, 5]]


@pytest.mark.parametrize("groups", [(1, 1), (4, 2)], ids=str)
def test_nan_among_the_logits_makes_the_weights_nan_and_the_experts_still_exist(groups):
    logits = random(3, 12)
    logits[1, 5] = float("nan")
    logits[2] = float("-inf")
    weights, experts = choose(logits, 3, *groups, normalize=False, scaling_factor=2.0)
    assert weights[0].isfinite().all()
    assert weights[1:].isnan().all()
    assert (experts.sort(dim=-1).values.diff(dim=-1) > 0).all()
    assert (experts >= 0).all()
    assert (experts < 12).all()
