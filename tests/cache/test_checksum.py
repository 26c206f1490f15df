"""The checksum sees every change of a tensor, whatever its dtype, shape and memory layout."""

import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_latent.cache.checksum import checksums, hash_tensors, position_factors


def in_plain_python(tensor: torch.Tensor) -> list[int]:
    """Computes the sums of `checksums` with Python's integers."""
    data = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    data += bytes(-len(data) % 4096)
    keys = [key % 2**64 for key in position_factors(torch.device("cpu")).tolist()]
    sums = []
    for start in range(0, len(data), 4096):
        total = 0
        for i, key in enumerate(keys):
            word = int.from_bytes(data[start + 8 * i : start + 8 * i + 8], "little", signed=True)
            total += (word ^ (word >> 29)) * key
        sums.append((total + 2**63) % 2**64 - 2**63)
    return sums


def test_the_checksum_is_the_sum_that_its_docstring_defines():
    tensor = torch.randn(3, 733)
    assert checksums(tensor).tolist() == in_plain_python(tensor)


def test_the_checksum_stays_as_it_is_in_files_that_exist():
    tensor = torch.arange(3000, dtype=torch.int32)
    assert hash_tensors({"x": tensor}) == "772ed9c4e56e05c6c9dde4d61832df3cf6a7f8268d7b19160d540036f9497f82"


def test_the_checksum_does_not_depend_on_the_number_of_threads():
    tensor, threads = torch.randn(600, 1001), torch.get_num_threads()
    with contextlib.ExitStack() as after:
        after.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        alone = checksums(tensor)
        torch.set_num_threads(3)
        assert torch.equal(checksums(tensor), alone)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (7, 0, 2), (4097,), (513, 8)], ids=str)
def test_any_shape_and_dtype_has_a_checksum_that_sees_its_last_bit(shape, dtype):
    tensor = torch.randint(0, 2, shape).to(dtype)
    before = hash_tensors({"x": tensor})
    assert before == hash_tensors({"x": tensor.clone()})
    if tensor.numel():
        tensor.view(-1).view(torch.uint8)[-1] ^= 1
        assert before != hash_tensors({"x": tensor})


@pytest.mark.parametrize("columns", [70, 64], ids="{} columns".format)
def test_the_memory_layout_does_not_enter_the_checksum(columns):
    base = torch.randn(64, columns)
    # starts one element after a word boundary
    shifted = torch.empty(base.numel() + 1)[1:].view_as(base).copy_(base)
    strided = torch.empty(columns, 64).t().copy_(base)
    assert {hash_tensors({"x": x}) for x in (shifted, strided)} == {hash_tensors({"x": base})}


def test_name_shape_and_dtype_enter_the_digest():
    zeros = torch.zeros(2, 3)
    different = [{"x": zeros}, {"y": zeros}, {"x": zeros.t()}, {"x": zeros.int()}, {"x": torch.zeros(2, 4)}]
    different += [{"x": zeros, "y": zeros}, {}]
    assert len({hash_tensors(tensors) for tensors in different}) == len(different)


def distinct_sums(rows: torch.Tensor) -> bool:
    assert rows[0].nbytes == 4096
    return checksums(rows).unique().numel() == len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_two_changes_of_two_signs_have_the_same_checksum(dtype):
    row = torch.randn(4096 // dtype.itemsize).to(dtype)
    pairs = list(itertools.combinations(range(48), 2))
    rows = row.repeat(len(pairs) + 1, 1)
    for changed, pair in zip(rows, pairs):
        changed[list(pair)] *= -1
    assert distinct_sums(rows)


def test_no_two_swaps_of_two_elements_have_the_same_checksum():
    row = torch.arange(2048, dtype=torch.int16)
    pairs = list(itertools.combinations(range(48), 2))
    rows = row.repeat(len(pairs) + 1, 1)
    for changed, (i, j) in zip(rows, pairs):
        changed[[i, j]] = changed[[j, i]]
    assert distinct_sums(rows)


def test_no_two_single_bits_have_the_same_checksum():
    rows = torch.zeros(4097, 4096, dtype=torch.uint8)
    for place in range(4096):
        rows[place, place] = 1 << place % 8
    assert distinct_sums(rows)


def test_a_checksum_allocates_little_memory():
    class Allocated(TorchDispatchMode):
        """Records the largest storage that is not an argument's."""

        nbytes = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
            out = function(*args, **(kwargs or {}))
            for made in out if isinstance(out, (list, tuple)) else [out]:
                if made.untyped_storage().data_ptr() not in given:
                    self.nbytes = max(self.nbytes, made.untyped_storage().nbytes())
            return out

    tensor = torch.zeros(1 << 25, dtype=torch.uint8)
    with Allocated() as allocated:
        checksums(tensor)
    assert 0 < allocated.nbytes <= torch.get_num_threads() << 19
