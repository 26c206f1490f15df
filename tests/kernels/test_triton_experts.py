"""The Triton kernels of experts and of the dense MLP, on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU, Triton runs by TRITON_INTERPRET=1", allow_module_level=True)

from torch.nn import functional as F

from deepseek_latent.experts import codec
from deepseek_latent.experts.codec import pack
from deepseek_latent.kernels.gpu import triton_experts
from deepseek_latent.kernels.gpu.triton_experts import Plan
from deepseek_latent.kernels.gpu.triton_tiles import Norm, Tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# small tiles, so that small widths need several of them
VECTOR = Plan(Tiles(4, 32, 4, 3), Tiles(8, 16, 4, 3))
MATRIX = Plan(Tiles(16, 32, 4, 3), Tiles(32, 16, 4, 3))
PLANS = pytest.mark.parametrize("plan", [VECTOR, MATRIX], ids=["vector", "matrix"])
BUDGET = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
E, K, D, F_, G = 7, 3, 40, 24, 56


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def choices(m, e=E, k=K):
    """Lopsided choices: most tokens choose low experts, and none chooses the last one."""
    scores = torch.rand(m, e, device=DEVICE) + torch.linspace(1, 0, e, device=DEVICE)
    scores[:, -1] = -1
    return scores.topk(k).indices


def inputs(m, dtype, d=D, f=F_, g=G, e=E, k=K):
    x, gate_up, down = random(m, d, dtype=dtype), random(e, 2 * f, d, dtype=dtype), random(e, d, f, dtype=dtype)
    shared = random(g, d, dtype=dtype), random(g, d, dtype=dtype), random(d, g, dtype=dtype)
    weights = torch.rand(m, k, device=DEVICE) + 0.1
    return x, gate_up, down, choices(m, e, k), weights, shared


def swiglu(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def exact(x, gate_up, down, chosen, weights, shared=None, residual=None):
    x = x.double()
    total = torch.zeros_like(x) if residual is None else residual.double()
    for token, slot in torch.cartesian_prod(torch.arange(chosen.shape[0]), torch.arange(chosen.shape[1])).tolist():
        e = int(chosen[token, slot])
        if 0 <= e < len(down):
            gate, up = gate_up[e].double().chunk(2)
            total[token] += weights[token, slot].double() * swiglu(x[token], gate, up, down[e].double())
    return total if shared is None else total + swiglu(x, *(w.double() for w in shared))


def assert_near(out, truth, dtype):
    assert out.dtype == dtype
    error = (out.double() - truth).norm() / truth.norm()
    assert error < BUDGET[dtype], f"relative error {error:.2e}"


@PLANS
@pytest.mark.parametrize("m", [1, 2, 5, 19], ids="m{}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_experts_are_the_weighted_sum_plus_shared_and_residual(m, dtype, plan):
    arguments, residual = inputs(m, dtype), random(m, D, dtype=dtype)
    out = triton_experts.experts(*arguments, residual=residual, plan=plan)
    assert_near(out, exact(*arguments, residual=residual), dtype)


@pytest.mark.parametrize("m", [1, 3], ids="m{}".format)
def test_default_plans_give_the_same(m):
    arguments = inputs(m, torch.float32)
    assert_near(triton_experts.experts(*arguments), exact(*arguments), torch.float32)


@PLANS
@pytest.mark.parametrize("m", [1, 4], ids="m{}".format)
def test_widths_may_be_odd_and_unaligned(m, plan):
    arguments = inputs(m, torch.float32, d=37, f=23, g=51, e=5, k=2)
    assert_near(triton_experts.experts(*arguments, plan=plan), exact(*arguments), torch.float32)


@PLANS
@pytest.mark.parametrize("m", [1, 4], ids="m{}".format)
def test_experts_need_no_shared_ones(m, plan):
    arguments = inputs(m, torch.float32)[:-1]
    assert_near(triton_experts.experts(*arguments, plan=plan), exact(*arguments), torch.float32)


@PLANS
def test_all_tokens_may_choose_alike(plan):
    x, gate_up, down, chosen, weights, shared = inputs(16, torch.float32)
    arguments = x, gate_up, down, chosen[:1].expand(16, -1).contiguous(), weights, shared
    assert_near(triton_experts.experts(*arguments, plan=plan), exact(*arguments), torch.float32)


@PLANS
@pytest.mark.parametrize("elsewhere", [E, E + 5, -1], ids=str)
def test_experts_of_another_rank_add_nothing(elsewhere, plan):
    x, gate_up, down, chosen, weights, shared = inputs(4, torch.float32)
    chosen[0, 1], chosen[2], chosen[3, 0] = elsewhere, elsewhere, elsewhere
    arguments = x, gate_up, down, chosen, weights, shared
    assert_near(triton_experts.experts(*arguments, plan=plan), exact(*arguments), torch.float32)


@PLANS
@pytest.mark.parametrize("m", [1, 4], ids="m{}".format)
def test_experts_that_nobody_chose_and_memory_around_the_inputs_are_not_read(m, plan):
    x, gate_up, down, chosen, weights, shared = inputs(m, torch.float32)
    truth = exact(x, gate_up, down, chosen, weights, shared)
    unused = [e for e in range(E) if e not in chosen.flatten().tolist()]
    gate_up[unused], down[unused] = torch.nan, torch.nan
    wide = torch.full((m + 1, 2 * D), torch.nan, device=DEVICE)
    wide[:m, :D] = x
    assert_near(triton_experts.experts(wide[:m, :D], gate_up, down, chosen, weights, shared, plan=plan), truth, x.dtype)


# several groups of 64 in a row and one; then groups of 8, in rows that no tile divides
WIDTHS = {"groups of 64": (128, 64), "groups of 8": (40, 24)}


@pytest.mark.parametrize(("plan", "m"), [(VECTOR, 1), (VECTOR, 2), (MATRIX, 4)], ids=["m1", "m2", "matrix"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_experts_are_those_that_torch_unpacks(dtype, widths, bits, m, plan):
    d, f = widths
    x, gate_up, down, chosen, weights, shared = inputs(m, dtype, d=d, f=f)
    # scales that differ by group, so that a wrong one changes the result
    gate_up *= torch.linspace(0.5, 2, d, device=DEVICE).to(dtype)
    packed, residual = [pack(weight, bits) for weight in (gate_up, down)], random(m, d, dtype=dtype)
    out = triton_experts.experts(x, *packed, chosen, weights, shared, residual, plan=plan)
    wide = [codec.Packed(p.codes, p.scales.float()).unpacked() for p in packed]
    assert_near(out, exact(x, *wide, chosen, weights, shared, residual), dtype)


@pytest.mark.parametrize(("plan", "m"), [(VECTOR, 1), (MATRIX, 4)], ids=["vector", "matrix"])
@pytest.mark.parametrize("bits", [8, 4])
def test_packed_experts_that_nobody_chose_are_not_read(bits, m, plan):
    x, gate_up, down, chosen, weights, _ = inputs(m, torch.float32)
    packed = [pack(weight, bits) for weight in (gate_up, down)]
    expected = triton_experts.experts(x, *packed, chosen, weights, plan=plan)
    unused = [e for e in range(E) if e not in chosen.flatten().tolist()]
    for one in packed:
        one.scales[unused] = torch.nan
    assert torch.equal(triton_experts.experts(x, *packed, chosen, weights, plan=plan), expected)


def test_a_norm_acts_before_packed_and_shared_experts():
    x, gate_up, down, chosen, weights, shared = inputs(1, torch.float32)
    packed, norm = [pack(weight, 8) for weight in (gate_up, down)], torch.nn.RMSNorm(D, eps=1e-5, device=DEVICE)
    torch.nn.init.uniform_(norm.weight, 0.5, 2)
    with torch.no_grad():
        out = triton_experts.experts(
            x, *packed, chosen, weights, shared, residual=x, norm=Norm(norm.weight, norm.eps), plan=VECTOR
        )
        normed = norm(x)
    truth = exact(normed, *(p.unpacked() for p in packed), chosen, weights, shared, residual=x)
    assert_near(out, truth, torch.float32)


@PLANS
def test_the_same_tokens_give_the_same_bits(plan):
    arguments = inputs(6, torch.float32)
    first, second = (triton_experts.experts(*arguments, plan=plan) for _ in range(2))
    assert torch.equal(first, second)


@PLANS
@pytest.mark.parametrize("m", [1, 3], ids="m{}".format)
def test_mlp_is_swiglu_plus_residual(m, plan, monkeypatch):
    monkeypatch.setattr(triton_experts, "PIECE", 20)
    x, shared, residual = random(m, D), inputs(1, torch.float32)[-1], random(m, D)
    out = triton_experts.mlp(x, *shared, residual=residual, plan=plan)
    assert_near(out, swiglu(x.double(), *(w.double() for w in shared)) + residual, torch.float32)
