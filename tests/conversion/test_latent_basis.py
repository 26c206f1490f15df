"""The basis of a converted model's latents: exact, and one that codes of few bits hold well."""

import pytest
import torch

from deepseek_latent.cache.format import latent_format
from deepseek_latent.conversion.latent_basis import (
    hartley,
    num_unquantized_channels,
    quantizable_basis,
    value_rotation,
)
from tests.support import seeded


def outliers_of_three_kinds(num_channels: int = 63, d: int = 70, tokens: int = 400):
    """A latent as a function of x, and x at many tokens: channels unlike each other, a constant, a huge first token."""
    latent = torch.randn(num_channels, d + 1, generator=seeded(0), dtype=torch.float64)
    latent *= torch.logspace(1.5, -1.5, num_channels, dtype=torch.float64)[:, None]
    latent[:, -1] = 0
    x = torch.randn(tokens, d + 1, generator=seeded(1), dtype=torch.float64)
    x[:, -1] = 1
    x[0] = 6 * torch.randn(d + 1, generator=seeded(2), dtype=torch.float64)
    return latent, x


def basis_for(latent: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return quantizable_basis(latent, x.T @ x / len(x), x[0])


def relative_error(channels: torch.Tensor, cache_dtype: str, num_unquantized: int) -> float:
    """The error of ordinary tokens [t c] in a quantized cache, relative to their size."""
    rows_format = latent_format(cache_dtype, channels.shape[1], 2, torch.float32, num_unquantized)
    rows = rows_format.encode(channels.float(), torch.zeros(len(channels), 2))
    error = rows_format.decode(rows, torch.float32)[:, :-2] - channels
    return (error[1:].norm() / channels[1:].norm()).item()


@pytest.mark.parametrize("c", [2, 4, 6, 10, 16, 64, 130])
def test_the_basis_is_orthogonal_whatever_the_widths(c):
    latent, x = outliers_of_three_kinds(c - 1)
    latent[(c - 1) // 2 :] = 0  # channels beyond the rank of keys and values
    for first_token in (x[0], torch.zeros_like(x[0])):
        basis = quantizable_basis(latent, x.T @ x / len(x), first_token)
        torch.testing.assert_close(basis @ basis.T, torch.eye(c - 1, dtype=torch.float64))


@pytest.mark.parametrize("n", [1, 2, 5, 56, 120, 216])
def test_the_hartley_transform_is_its_own_inverse(n):
    torch.testing.assert_close(hartley(n) @ hartley(n), torch.eye(n, dtype=torch.float64))


def test_the_first_token_lies_in_the_last_channel():
    latent, x = outliers_of_three_kinds()
    first = basis_for(latent, x) @ latent @ x[0]
    assert first[:-1].norm() < 1e-9 * first[-1].abs()


def test_channels_that_are_coded_are_alike():
    latent, x = outliers_of_three_kinds()
    u = num_unquantized_channels(64)

    def spread(channels):
        energy = channels[1:].square().mean(dim=0)
        return (energy.max() / energy.min()).item()

    before, after = x @ latent.T, x @ (basis_for(latent, x) @ latent).T
    assert spread(before) > 1e5
    assert spread(after[:, : 64 - u]) < 5


@pytest.mark.parametrize("cache_dtype", ["int8", "int6", "int5", "int4"])
def test_a_quantized_cache_changes_latents_less_in_the_chosen_basis(cache_dtype):
    latent, x = outliers_of_three_kinds()
    constant = torch.ones(len(x), 1, dtype=torch.float64)
    before, after = (torch.cat((x @ y.T, constant), dim=1) for y in (latent, basis_for(latent, x) @ latent))
    given = relative_error(before, cache_dtype, 0)
    assert relative_error(after, cache_dtype, num_unquantized_channels(64)) < given / 3


@pytest.mark.parametrize("w", [1, 2, 6, 64, 80, 96, 128])
def test_values_are_rotated_and_rotated_back_exactly(w):
    there, back = value_rotation(w)
    assert torch.equal(back @ there, torch.eye(w))
    # kv_b_proj holds the second one in any dtype
    assert torch.equal(back.bfloat16().float(), back)


def test_values_of_unlike_channels_become_alike():
    values = torch.randn(999, 64, generator=seeded(0)) * torch.logspace(2, -2, 64)
    rotated = (values @ value_rotation(64)[0].T).square().mean(dim=0)
    assert rotated.max() / rotated.min() < 1.5
    assert values.square().mean(dim=0).max() / values.square().mean(dim=0).min() > 1e7
