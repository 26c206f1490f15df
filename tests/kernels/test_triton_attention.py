"""The GPU kernel of absorbed attention, run by Triton's interpreter if there is no GPU."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU these tests need TRITON_INTERPRET=1", allow_module_level=True)

from deepseek_latent.cache.format import latent_format  # noqa: E402
from deepseek_latent.kernels.gpu.triton_attention import attend, num_splits  # noqa: E402
from deepseek_latent.kernels.gpu.triton_tiling import Tiling, tiling  # noqa: E402

SCALE = 0.2
# small tiles and splits, so that short caches have many of them
CUT = Tiling(rows=16, tokens=16, num_warps=4, num_stages=2, programs_per_sm=1, tokens_per_split=32)
# relative error of products of operands in these dtypes
BUDGET = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def exact(q_absorbed, q_rotary, latent, k_rotary, visible):
    """In float64, from latents [b t c], keys [b t r] and a mask [b s t]; a query that sees no token gives zeros."""
    q_absorbed, q_rotary, latent, k_rotary = (x.double() for x in (q_absorbed, q_rotary, latent, k_rotary))
    scores = torch.einsum("bshc,btc->bsht", q_absorbed, latent) + torch.einsum("bshr,btr->bsht", q_rotary, k_rotary)
    weights = (scores * SCALE).masked_fill(~visible[:, :, None], -torch.inf).softmax(dim=-1).nan_to_num(0.0)
    return torch.einsum("bsht,btc->bshc", weights, latent)


def causal(b, s, t, held=None, first=None):
    held = t if held is None else held
    last = torch.arange(held - s, held, device=DEVICE)[None, :, None]
    position = torch.arange(t, device=DEVICE)
    hidden = torch.zeros(b, device=DEVICE) if first is None else first
    return (position <= last) & (position >= hidden[:, None, None])


def random_queries(b, s, h, c, r, dtype=torch.float32):
    torch.manual_seed(b + s + h + c)
    # strided as a product by heads leaves them, and as a slice of a wider tensor
    q_absorbed = torch.randn(h, b, s, c, device=DEVICE).to(dtype).permute(1, 2, 0, 3)
    return q_absorbed, torch.randn(b, s, h, r + 24, device=DEVICE).to(dtype)[..., 24:]


def random_rows(b, t, c, r, dtype=torch.float32):
    torch.manual_seed(t)
    loudness = torch.linspace(0.5, 1.5, c + r, device=DEVICE)
    return (torch.randn(b, t, c + r, device=DEVICE) * loudness).to(dtype)


def error(out, truth):
    assert out.shape == truth.shape
    return ((out.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("s", "h", "c", "r", "t"), [(2, 3, 40, 8, 50), (1, 16, 256, 16, 97), (7, 5, 200, 24, 7)])
def test_attention_equals_float64(dtype, s, h, c, r, t):
    queries, rows = random_queries(2, s, h, c, r, dtype), random_rows(2, t, c, r, dtype)
    latent, k_rotary = rows.split((c, r), dim=-1)
    out = attend(*queries, [latent], [k_rotary], scale=SCALE, cut=CUT)
    assert out.dtype == dtype
    assert error(out, exact(*queries, latent, k_rotary, causal(2, s, t))) < BUDGET[dtype]


@pytest.mark.parametrize("per_split", [16, 48, 1000], ids="per_split{}".format)
def test_splits_change_nothing_but_rounding(per_split):
    queries, rows = random_queries(3, 2, 3, 40, 8), random_rows(3, 133, 40, 8)
    pairs = [[x] for x in rows.split((40, 8), dim=-1)]
    out = attend(*queries, *pairs, scale=SCALE, cut=CUT._replace(tokens_per_split=per_split))
    assert error(out, exact(*queries, *(x for [x] in pairs), causal(3, 2, 133))) < BUDGET[torch.float32]


@pytest.mark.parametrize("held", [3, 16, 17, 50], ids="held{}".format)
@pytest.mark.parametrize("is_shared", [False, True], ids=["own", "shared"])
def test_no_token_behind_length_is_read(held, is_shared):
    queries = random_queries(2, 3, 3, 40, 8)
    prefix, rows = random_rows(1 if is_shared else 2, 21, 40, 8), random_rows(2, 64, 40, 8)
    rows[:, held:] = torch.nan
    length = torch.tensor([held], dtype=torch.int32, device=DEVICE)
    latents, keys = zip(*(x.split((40, 8), dim=-1) for x in (prefix, rows)))
    out = attend(*queries, list(latents), list(keys), scale=SCALE, length=length, cut=CUT)
    both = torch.cat((prefix.expand(2, -1, -1), rows[:, :held]), dim=1).split((40, 8), dim=-1)
    assert error(out, exact(*queries, *both, causal(2, 3, 21 + held))) < BUDGET[torch.float32]


@pytest.mark.parametrize("first", [[0, 5], [16, 43], [44, 17]], ids=str)
@pytest.mark.parametrize("num_common", [0, 18], ids="common{}".format)
def test_no_token_before_first_is_read(first, num_common):
    queries, rows = random_queries(2, 3, 3, 40, 8), random_rows(2, 45, 40, 8)
    first = torch.tensor(first, dtype=torch.int32, device=DEVICE)
    truth = exact(*queries, *rows.split((40, 8), dim=-1), causal(2, 3, 45, first=first))
    for i in range(2):
        rows[i, : first[i]] = torch.nan
    parts = rows.split((num_common, 45 - num_common), dim=1)
    latents, keys = zip(*(x.split((40, 8), dim=-1) for x in parts))
    out = attend(*queries, list(latents), list(keys), scale=SCALE, first=first, cut=CUT)
    assert error(out, truth) < BUDGET[torch.float32]


@pytest.mark.parametrize("is_common", [False, True], ids=["each", "common"])
def test_a_query_sees_what_its_mask_shows(is_common):
    queries, rows = random_queries(2, 3, 3, 40, 8), random_rows(2, 77, 40, 8)
    latent, k_rotary = rows.split((40, 8), dim=-1)
    mask = torch.rand(1 if is_common else 2, 1, 3, 77, device=DEVICE) > 0.6
    mask[-1, 0, 1] = False
    latents, keys = list(latent.split((30, 47), dim=1)), list(k_rotary.split((30, 47), dim=1))
    out = attend(*queries, latents, keys, scale=SCALE, mask=mask, cut=CUT)
    truth = exact(*queries, latent, k_rotary, mask[:, 0].expand(2, -1, -1))
    assert error(out, truth) < BUDGET[torch.float32]
    assert (out[-1, 1] == 0).all()


def test_before_the_first_token_queries_give_zeros():
    queries, rows = random_queries(2, 1, 3, 40, 8), torch.full((2, 64, 48), torch.nan, device=DEVICE)
    latents, keys = ([x] for x in rows.split((40, 8), dim=-1))
    length = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for cut in (CUT, CUT._replace(tokens_per_split=1000)):
        assert (attend(*queries, latents, keys, scale=SCALE, length=length, cut=cut) == 0).all()


@pytest.mark.parametrize("bits", [8, 6, 5, 4, "fp8"], ids="{}bits".format)
@pytest.mark.parametrize(("c", "r"), [(40, 8), (256, 16), (512, 64)])
def test_codes_equal_what_they_stand_for(bits, c, r):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    queries, form = (
        random_queries(2, 2, 3, c, r, dtype),
        latent_format(f"int{bits}" if bits != "fp8" else bits, c, r, torch.float32),
    )
    values = random_rows(2, 37, c, r)
    # planes of unlike size, so that a scale of another plane shows
    values[..., :c] *= 2.0 ** torch.arange(c, device=DEVICE).div(128, rounding_mode="floor")
    rows = form.encode(*values.split((c, r), dim=-1))
    truth = exact(*queries, *form.decode(rows, torch.float64).split((c, r), dim=-1), causal(2, 2, 37))
    latents = [x[..., : -2 * r] for x in rows.split((20, 17), dim=1)]
    keys = [x[..., -2 * r :].view(torch.bfloat16) for x in rows.split((20, 17), dim=1)]
    out = attend(*queries, latents, keys, scale=SCALE, bits=str(bits), cut=CUT)
    assert error(out, truth) < BUDGET[dtype]


WIDTHS = [(x, c, 8) for x in ("int8", "int6", "int5", "int4", "fp8") for c in (88, 144)]


@pytest.mark.parametrize(
    ("cache_dtype", "c", "u"), [*WIDTHS, ("int5", 9, 6), ("int4", 135, 6), ("int8", 196, 0), ("int4", 196, 0)]
)
def test_rows_with_unquantized_channels_equal_what_they_stand_for(cache_dtype, c, u):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    queries, form = random_queries(2, 2, 3, c, 32, dtype), latent_format(cache_dtype, c, 32, torch.float32, u)
    # the first segment is a prefix that both sequences share, the second has room for more tokens than it holds
    values = random_rows(2, 37, c, 32)
    values[1, :20] = values[0, :20]
    values[..., 128 : c - u] *= 2
    values[..., c - u : c] *= 16
    rows = form.encode(*values.split((c, 32), dim=-1))
    first = torch.tensor([3, 23], device=DEVICE)
    truth = form.decode(rows, torch.float64).split((c, 32), dim=-1)
    truth = exact(*queries, *truth, causal(2, 2, 37, first=first))
    beyond = torch.full((2, 9, form.row_width), 0xFF, dtype=torch.uint8, device=DEVICE)
    segments = rows[:1, :20], torch.cat((rows[:, 20:], beyond), dim=1)
    num_bytes = 2 * (u + 32)
    latents = [x[..., :-num_bytes] for x in segments]
    in_bfloat16 = [x[..., -num_bytes:].view(torch.bfloat16) for x in segments]
    given = {"bits": cache_dtype.removeprefix("int"), "length": torch.tensor([17], device=DEVICE), "first": first}
    out = attend(*queries, latents, in_bfloat16, scale=SCALE, **given, cut=CUT)
    assert error(out, truth) < BUDGET[dtype]


@pytest.mark.parametrize("bits", ["", "4"], ids=["as stored", "codes"])
@pytest.mark.parametrize("held", [0, 3, 40], ids="held{}".format)
def test_codes_and_elements_of_no_token_behind_length_are_read(bits, held):
    form = latent_format(f"int{bits}" if bits else None, 64, 32, torch.float32)
    queries, rows = random_queries(2, 1, 3, 64, 32), form.encode(*random_rows(2, 96, 64, 32).split((64, 32), dim=-1))
    truth = form.decode(rows, torch.float64)[:, :held].split((64, 32), dim=-1)
    rows[:, held:] = 0xFF if bits else torch.nan  # scales and keys of 0xFFFF are NaN
    latent, k_rotary = (rows[..., :-64], rows[..., -64:].view(torch.bfloat16)) if bits else rows.split((64, 32), dim=-1)
    length = torch.tensor([held], dtype=torch.int32, device=DEVICE)
    out = attend(*queries, [latent], [k_rotary], scale=SCALE, bits=bits, length=length, cut=CUT)
    truth_or_zeros = exact(*queries, *truth, causal(2, 1, held)) if held else torch.zeros_like(out)
    assert torch.allclose(out.double(), truth_or_zeros.double(), atol=1e-4)


@pytest.mark.parametrize("splits", [2, 63, 65, 130], ids="splits{}".format)
def test_any_number_of_splits_gives_the_same_result(splits, monkeypatch):
    monkeypatch.setattr("deepseek_latent.kernels.gpu.triton_attention.num_splits", lambda *_: splits)
    queries, rows = random_queries(1, 1, 3, 40, 8), random_rows(1, 16 * splits - 5, 40, 8)
    pairs = [[x] for x in rows.split((40, 8), dim=-1)]
    out = attend(*queries, *pairs, scale=SCALE, cut=CUT._replace(tokens_per_split=16))
    assert error(out, exact(*queries, *(x for [x] in pairs), causal(1, 1, 16 * splits - 5))) < BUDGET[torch.float32]


@pytest.mark.parametrize("num_rows", [16, 32, 128], ids="rows{}".format)
@pytest.mark.parametrize("batch", [1, 8, 64, 1000], ids="batch{}".format)
def test_never_more_programs_than_are_resident(num_rows, batch):
    cut = tiling(num_rows, "")
    num_programs = batch * triton.cdiv(num_rows, cut.rows)
    splits = num_splits(num_programs, 1 << 17, cut, torch.device("cpu"))
    assert splits == 1 or splits * num_programs <= 132 * cut.programs_per_sm


def test_the_cut_for_these_shapes_gives_the_same():
    queries, rows = random_queries(1, 3, 16, 40, 8), random_rows(1, 300, 40, 8)
    latents, keys = ([x] for x in rows.split((40, 8), dim=-1))
    out = attend(*queries, latents, keys, scale=SCALE)
    assert error(out, exact(*queries, *rows.split((40, 8), dim=-1), causal(1, 3, 300))) < BUDGET[torch.float32]
