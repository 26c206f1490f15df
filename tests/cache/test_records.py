"""Cached tokens as the records of 656 bytes of FlashMLA, vLLM ("fp8_ds_mla") and SGLang, byte for byte."""

import pytest
import torch
from torch import Tensor

from deepseek_latent import DeepseekV2Config, LatentCache
from deepseek_latent.cache.format import latent_format
from tests.support import V2, seeded

every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def read_record(records: Tensor) -> Tensor:
    """Converts bytes [.. 656] to [.. 576] in float64: 512 e4m3 codes, four float32 scales, 64 bfloat16."""
    codes = records[..., :512].view(torch.float8_e4m3fn).double()
    scales = records[..., 512:528].contiguous().view(torch.float32).double()
    rotary = records[..., 528:].contiguous().view(torch.bfloat16).double()
    return torch.cat((codes * scales.repeat_interleave(128, dim=-1), rotary), dim=-1)


def write_record(latent: Tensor, k_rotary: Tensor) -> Tensor:
    tiles = latent.float().unflatten(-1, (4, 128))
    scales = tiles.abs().amax(dim=-1) / 448
    codes = (tiles / scales[..., None]).to(torch.float8_e4m3fn).flatten(-2)
    return torch.cat([x.contiguous().view(torch.uint8) for x in (codes, scales, k_rotary.bfloat16())], dim=-1)


def foreign_records(*shape: int) -> Tensor:
    """Records that another program may have written: any finite codes, with scales of any size."""
    codes = torch.randint(256, (*shape, 512), dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x80  # -0 in place of NaN
    scales = torch.rand(*shape, 4) * torch.randint(-20, 20, (*shape, 4)).float().exp2()
    scales[..., 1] = torch.randint(-20, 20, shape).float().exp2()
    rotary = (torch.randn(*shape, 64) * 3).bfloat16()
    return torch.cat((codes, scales.view(torch.uint8), rotary.view(torch.uint8)), dim=-1)


@every_dtype
def test_an_fp8_row_is_the_record_of_656_bytes(dtype):
    rows_format = latent_format("fp8", 512, 64, dtype)
    latent = (noise(50, 512) * noise(50, 1, seed=1).exp()).to(dtype)
    k_rotary = noise(50, 64, seed=2).to(dtype)
    records = rows_format.encode(latent, k_rotary)
    assert torch.equal(records, write_record(latent, k_rotary))
    assert torch.equal(rows_format.decode(records, torch.float64), read_record(records))


def test_every_finite_code_of_e4m3_is_written_and_read():
    codes = torch.cat((torch.arange(0x7F), torch.arange(0x80, 0xFF))).to(torch.uint8)
    for scale in (2.0**-3, 1.0, 2.0**40):
        latent = codes.view(torch.float8_e4m3fn).float() * scale
        # a tile of both halves has the largest code in each of its planes
        latent = torch.cat((latent[:127], torch.tensor([0.0]), latent[127:]))
        rows_format = latent_format("fp8", len(latent), 2, torch.float32)
        rows = rows_format.encode(latent, torch.zeros(2))
        assert rows[:127].tolist() == codes[:127].tolist()
        assert rows[128 : 128 + 127].tolist() == codes[127:].tolist()
        assert torch.equal(rows_format.decode(rows, torch.float32)[:-2], latent)


def config_of_records(**changes) -> DeepseekV2Config:
    return DeepseekV2Config(**V2 | {"kv_lora_rank": 512, "qk_rope_head_dim": 64} | changes)


@every_dtype
@torch.no_grad()
def test_foreign_records_are_returned_bit_for_bit(dtype):
    records = [foreign_records(3, 7) for _ in range(3)]
    cache = LatentCache.from_flashmla_records([x.clone() for x in records], config_of_records(), dtype)
    assert (cache.cache_dtype, cache.get_seq_length(), cache.nbytes) == ("fp8", 7, 3 * 3 * 7 * 656)
    assert all(torch.equal(a, b) for a, b in zip(cache.flashmla_records(), records, strict=True))
    for layer, foreign in zip(cache.layers, records):
        exact = read_record(foreign)
        assert layer.keys.dtype == dtype
        both = torch.cat((layer.keys, layer.values), dim=-1)[:, 0]
        assert torch.equal(both, exact.float().to(dtype) if dtype != torch.float64 else exact)
    # later tokens do not change them
    for i, layer in enumerate(cache.layers):
        layer.update(noise(3, 1, 2, 512, seed=i).to(dtype), noise(3, 1, 2, 64, seed=i).to(dtype))
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.crop(-1)
    for i, (now, foreign) in enumerate(zip(cache.flashmla_records(), records, strict=True)):
        new = write_record(noise(3, 2, 512, seed=i).to(dtype), noise(3, 2, 64, seed=i).to(dtype))
        assert torch.equal(now, torch.cat((foreign, new[:, :1]), dim=1)[[2, 0]])


@pytest.mark.parametrize("cache_dtype", [None, "int8", "int4"], ids=str)
@torch.no_grad()
def test_any_other_cache_gives_records_of_its_tokens(cache_dtype):
    cache = LatentCache(config_of_records(), cache_dtype=cache_dtype)
    for i in range(3):
        cache.update(noise(1, 1, 5, 512, seed=i).bfloat16(), noise(1, 1, 5, 64, seed=i).bfloat16(), i)
    cache.batch_repeat_interleave(2)
    for i in range(3):
        cache.update(noise(2, 1, 1, 512, seed=i).bfloat16(), noise(2, 1, 1, 64, seed=i).bfloat16(), i)
    for layer, records in zip(cache.layers, cache.flashmla_records(), strict=True):
        assert torch.equal(records, write_record(layer.keys[:, 0], layer.values[:, 0]))


@torch.no_grad()
def test_records_of_another_shape_are_refused_in_one_sentence():
    widths = "records of 656 bytes have latent width 512 and rotary width 64, this model has 40 and 8"
    cache = LatentCache(DeepseekV2Config(**V2))
    for i in range(3):
        cache.update(noise(2, 1, 5, 40), noise(2, 1, 5, 8), i)
    with pytest.raises(ValueError, match=widths):
        cache.flashmla_records()
    with pytest.raises(ValueError, match=widths):
        LatentCache.from_flashmla_records([foreign_records(1, 2)] * 3, DeepseekV2Config(**V2))
    with pytest.raises(ValueError, match="this model has 512 and 32"):
        LatentCache.from_flashmla_records([foreign_records(1, 2)] * 3, config_of_records(qk_rope_head_dim=32))
    for records, shapes in (
        ([foreign_records(1, 2)] * 2, r"\[\[1, 2, 656\], \[1, 2, 656\]\]"),
        ([foreign_records(2)] * 3, r"\[\[2, 656\], \[2, 656\], \[2, 656\]\]"),
        ([foreign_records(1, 2)[..., :640]] * 3, r"\[\[1, 2, 640\], \[1, 2, 640\], \[1, 2, 640\]\]"),
        ([foreign_records(1, t) for t in (2, 2, 1)], r"\[\[1, 2, 656\], \[1, 2, 656\], \[1, 1, 656\]\]"),
        ([foreign_records(b, 2) for b in (1, 2, 1)], r"\[\[1, 2, 656\], \[2, 2, 656\], \[1, 2, 656\]\]"),
        ([], r"\[\]"),
    ):
        with pytest.raises(ValueError, match=rf"3 layers of records of the same shape \[b t 656\], got {shapes}"):
            LatentCache.from_flashmla_records(records, config_of_records())
    with pytest.raises(ValueError, match=r"expected records of bytes, got torch\.float32"):
        LatentCache.from_flashmla_records([foreign_records(1, 2).float()] * 3, config_of_records())


@pytest.mark.parametrize(("place", "value"), [(7, 0x7F), (511, 0xFF), (515, 0x7F), (515, 0xFF)])
def test_records_with_nan_or_infinity_are_refused(place, value):
    records = [foreign_records(2, 3) for _ in range(3)]
    records[1][1, 2, place] = value
    if place >= 512:
        records[1][1, 2, 514] = 0x80  # the scale's exponent is all ones
    with pytest.raises(ValueError, match="the records of layer 1 hold NaN or infinite latents"):
        LatentCache.from_flashmla_records(records, config_of_records())


@torch.no_grad()
def test_records_and_cache_share_no_memory():
    # one tensor is misaligned by a byte, another is strided
    lying = torch.empty(3 * 7 * 656 + 1, dtype=torch.uint8)[1:].view(3, 7, 656).copy_(foreign_records(3, 7))
    sparse = torch.empty(3, 7, 1312, dtype=torch.uint8)[..., ::2].copy_(foreign_records(3, 7))
    given = [lying, sparse, foreign_records(3, 7)]
    before = [x.clone() for x in given]
    cache = LatentCache.from_flashmla_records(given, config_of_records())
    taken = cache.flashmla_records()
    cache.crop(-2)
    for i in range(3):
        cache.update(noise(3, 1, 2, 512).bfloat16(), noise(3, 1, 2, 64).bfloat16(), i)
    for old, one, other, new in zip(before, given, taken, cache.flashmla_records(), strict=True):
        assert torch.equal(one, old)
        assert torch.equal(other, old)
        assert torch.equal(new[:, :5], old[:, :5])
        assert not torch.equal(new, old)


def test_an_empty_cache_has_no_records():
    with pytest.raises(ValueError, match="this cache is empty, there is nothing to make records of"):
        LatentCache(config_of_records(), cache_dtype="fp8").flashmla_records()
