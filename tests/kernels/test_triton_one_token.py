"""The kernels of a single token, on a GPU or, with TRITON_INTERPRET=1, on the CPU."""

import os

import pytest
import torch
from torch import nn

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU, Triton runs by TRITON_INTERPRET=1", allow_module_level=True)

from deepseek_latent.cache.format import latent_format  # noqa: E402
from deepseek_latent.kernels.gpu import one_token as gpu_one_token  # noqa: E402
from deepseek_latent.kernels.gpu.triton_attention import attend, attend_in_splits  # noqa: E402
from deepseek_latent.kernels.gpu.triton_experts import experts, mlp  # noqa: E402
from deepseek_latent.kernels.gpu.triton_norm import rms_norm  # noqa: E402
from deepseek_latent.kernels.gpu.triton_one_token import expand, rotate_write_absorb  # noqa: E402
from deepseek_latent.kernels.gpu.triton_project import project  # noqa: E402
from deepseek_latent.kernels.gpu.triton_router import choose  # noqa: E402
from deepseek_latent.kernels.gpu.triton_tiles import Norm, Tiles  # noqa: E402
from deepseek_latent.kernels.gpu.triton_tiling import Tiling  # noqa: E402
from deepseek_latent.kernels.gpu.triton_write import norm_rotate_write  # noqa: E402

EPS = 1e-6
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
BUDGET = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def random(*shape, dtype=torch.float32):
    return (torch.randn(*shape, device=DEVICE) * torch.linspace(0.5, 2.0, shape[-1], device=DEVICE)).to(dtype)


def assert_near(out, truth, dtype):
    assert out.shape == truth.shape
    error = (out.double() - truth.double()).norm() / truth.double().norm()
    assert error < BUDGET[dtype], f"relative error {error:.2e}"


def exact_norm(x, norm):
    """The exact norm, rounded to the dtype of x as the module rounds it, in float64."""
    return nn.functional.rms_norm(x.double(), norm.weight.shape, norm.weight.double(), EPS).to(x.dtype).double()


@DTYPES
@pytest.mark.parametrize("width", [37, 64, 1100], ids="w{}".format)
@pytest.mark.parametrize("tiles", [Tiles(2, 32, 4, 1), Tiles(1, 2048, 4, 1), None], ids=str)
def test_two_weights_and_a_norm_share_a_launch(tiles, width, dtype):
    x, norm = random(1, width, dtype=dtype), Norm(random(width, dtype=dtype), EPS)
    weights = [random(n, width, dtype=dtype) for n in (9, 6)]
    outs = project(x, weights, norm, tiles=tiles)
    for out, weight in zip(outs, weights):
        assert out.dtype == dtype
        assert_near(out, exact_norm(x, norm) @ weight.double().T, dtype)


@DTYPES
def test_a_product_adds_its_residual_and_rounds_once(dtype):
    memory = torch.full((1, 100), torch.nan, device=DEVICE, dtype=dtype)
    memory[:, :50] = random(1, 50, dtype=dtype)
    x, weight, residual = memory[:, :50], random(7, 50, dtype=dtype), random(1, 7, dtype=dtype)
    (out,) = project(x, [weight], residual=residual)
    truth = x.double() @ weight.double().T + residual.double()
    error = (out.double() - truth).abs() - truth.abs() * torch.finfo(dtype).eps * 0.51
    assert (error <= 1e-5).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_logits_are_float32(dtype):
    x, norm, weight = random(1, 72, dtype=dtype), Norm(random(72, dtype=dtype), EPS), random(12, 72, dtype=dtype)
    (out,) = project(x, [weight], norm, dtype=torch.float32, tiles=gpu_one_token.ROUTER_TILES)
    assert out.dtype == torch.float32
    assert_near(out, rms_norm(x, *norm).double() @ weight.double().T, torch.float32)


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU overlaps launches")
def test_overlapping_launches_give_the_same_bytes():
    first, router = random(1, 2048, dtype=torch.bfloat16), random(64, 2048, dtype=torch.bfloat16) / 64
    norms = [Norm(random(2048, dtype=torch.bfloat16), EPS) for _ in range(20)]
    square = random(2048, 2048, dtype=torch.bfloat16) / 64
    results = []
    for overlap in (False, True):
        x = first
        for norm in norms:
            (x,) = project(x, [square], norm, x, overlap=overlap)
            (logits,) = project(
                x, [router], norm, dtype=torch.float32, tiles=gpu_one_token.ROUTER_TILES, overlap=overlap
            )
            chosen = choose(logits, 6, 1, 1, normalize=True, scaling_factor=1.0, overlap=overlap)
        results.append((x, logits, *chosen))
    assert all(torch.equal(*pair) for pair in zip(*results))


@pytest.mark.parametrize("on_device", [True, False], ids=["tensor", "int"])
@pytest.mark.parametrize(("bits", "u"), [(None, 0), (8, 0), (4, 0), (8, 6), (4, 6)], ids=str)
@pytest.mark.parametrize(("h", "n", "r", "c"), [(3, 12, 8, 40), (17, 16, 4, 300)], ids=str)
def test_one_launch_writes_rotates_and_absorbs(h, n, r, c, bits, u, on_device):
    dtype = torch.bfloat16
    queries, compressed = random(1, 1, h, n + r, dtype=dtype), random(1, 1, c + r, dtype=dtype)
    norm, angles = Norm(random(c, dtype=dtype), EPS), random(1, 1, r // 2) * 9
    # a view of both up-projections, whose other half is not to be read
    up = torch.full((h, n + 5, c), torch.nan, device=DEVICE, dtype=dtype)
    up[:, :n] = random(h, n, c, dtype=dtype)
    format = latent_format(bits and f"int{bits}", c, r, dtype, u)
    coded = {"bits": bits, "num_unquantized": u}
    rows = torch.full((2, 1, 9, format.row_width), 77, device=DEVICE, dtype=format.storage_dtype)
    start, turned = torch.tensor(4, device=DEVICE) if on_device else 4, queries.clone()
    rotation = angles.cos(), angles.sin()
    norm_rotate_write(turned, compressed, *norm, *rotation, rows[0], start, **coded)
    out = rotate_write_absorb(queries, compressed, norm, *rotation, rows[1], start, up[:, :n], **coded)
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(queries, turned)
    truth = torch.einsum("bshn,hnc->bshc", queries[..., :n].double(), up[:, :n].double())
    assert_near(out, truth, dtype)


@DTYPES
@pytest.mark.parametrize("held", [1, 40, 133], ids="held{}".format)
@pytest.mark.parametrize("per_split", [16, 1000], ids="per_split{}".format)
def test_expansion_combines_splits_in_the_same_launch(per_split, held, dtype):
    h, c, r, v = 3, 40, 8, 21
    cut = Tiling(rows=16, tokens=16, num_warps=4, num_stages=2, programs_per_sm=1, tokens_per_split=per_split)
    queries = random(1, 1, h, c, dtype=dtype), random(1, 1, h, r, dtype=dtype)
    rows = torch.full((1, 400, c + r), torch.nan, device=DEVICE, dtype=dtype)
    rows[:, :held] = random(1, held, c + r, dtype=dtype)
    up = torch.full((h, v + 6, c), torch.nan, device=DEVICE, dtype=dtype)
    up[:, 6:] = random(h, v, c, dtype=dtype)
    given = [[x] for x in rows.split((c, r), dim=-1)]
    options = {"scale": 0.2, "length": torch.tensor([held], device=DEVICE), "cut": cut}
    context = attend(*queries, *given, **options)
    out = expand(*attend_in_splits(*queries, *given, **options), up[:, 6:])
    assert_near(out, torch.einsum("bshc,hvc->bshv", context.double(), up[:, 6:].double()).flatten(1), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d", [40, 1100], ids="d{}".format)
def test_experts_normalize_their_input_in_the_same_launch(d, dtype):
    x, norm, residual = random(1, d, dtype=dtype), Norm(random(d, dtype=dtype), EPS), random(1, d, dtype=dtype)
    shared = random(11, d, dtype=dtype), random(11, d, dtype=dtype), random(d, 11, dtype=dtype)
    stacked = random(5, 12, d, dtype=dtype), random(5, d, 6, dtype=dtype)
    chosen, weights = torch.tensor([[4, 1]], device=DEVICE), torch.tensor([[0.7, 0.2]], device=DEVICE)
    for layer, given in ((experts, (*stacked, chosen, weights, shared)), (mlp, shared)):
        out = layer(x, *given, residual=residual, norm=norm)
        assert_near(out, layer(rms_norm(x, *norm), *given, residual=residual), dtype)
