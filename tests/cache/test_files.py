"""Files of tensors are read as they were written, or refused."""

import contextlib
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deepseek_latent.cache import files as cache_files
from deepseek_latent.cache.files import file_nbytes, read_metadata, read_tensors, write_tensors
from tests.support import seeded

METADATA = {"tokens": [[3, 1, 2]], "text": "naïve", "scale": 0.1, "nested": {"none": None}}


def some_tensors() -> dict[str, torch.Tensor]:
    generator = seeded(7)
    return {
        "half": torch.randn(3, 5, generator=generator).bfloat16(),
        "bytes": torch.randint(0, 256, (7,), dtype=torch.uint8, generator=generator),
        "single": torch.randn(4, generator=generator),
        "eighth": torch.randn(3, generator=generator).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
    }


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))
        for a, b in ((left[name], right[name]) for name in left)
    )


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def run_python(program: str, *arguments) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)


def test_tensors_and_metadata_come_back_as_they_were(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    tensors, metadata = read_tensors(tmp_path / "a")
    assert equal(tensors, some_tensors())
    assert metadata == METADATA == read_metadata(tmp_path / "a")


def test_a_file_may_hold_no_tensor(tmp_path):
    write_tensors(tmp_path / "a", {}, {})
    assert read_tensors(str(tmp_path / "a")) == ({}, {})


def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path):
    for tensors, metadata in [({}, {}), (some_tensors(), METADATA), ({"é\n": torch.zeros(1 << 16)}, {"x": '"\\ü'})]:
        write_tensors(tmp_path / "a", tensors, metadata)
        assert file_nbytes(tensors, metadata) == os.path.getsize(tmp_path / "a")


def test_tensors_that_are_not_contiguous_or_need_gradients_are_written_too(tmp_path):
    tensors = {"turned": torch.randn(3, 5).t(), "trained": torch.nn.Parameter(torch.randn(3))}
    write_tensors(tmp_path / "a", tensors, {})
    assert equal(read_tensors(tmp_path / "a")[0], {name: x.detach() for name, x in tensors.items()})


def test_the_file_is_a_safetensors_file(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    assert equal(load_file(tmp_path / "a"), some_tensors())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_memory_mapped_and_writing_to_them_does_not_change_the_file(tmp_path):
    write_tensors(tmp_path / "mapped", {"x": torch.zeros(1 << 16)}, {})
    tensor = read_tensors(tmp_path / "mapped", verify=False)[0]["x"]
    places = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "/mapped" in line]
    ranges = [[int(end, 16) for end in place.split("-")] for place in places]
    assert any(start <= tensor.data_ptr() < end for start, end in ranges)
    tensor.fill_(1)
    assert not read_tensors(tmp_path / "mapped")[0]["x"].any()


def test_replacing_or_removing_a_file_does_not_change_tensors_read_from_it(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.ones(1 << 16)}, {})
    read = read_tensors(tmp_path / "a", verify=False)[0]["x"]
    write_tensors(tmp_path / "a", {"x": torch.zeros(1)}, {})
    (tmp_path / "a").unlink()
    assert read.eq(1).all()


def test_one_flipped_bit_anywhere_is_refused(tmp_path):
    path = tmp_path / "a"
    write_tensors(path, {"x": torch.randn(2), "y": torch.arange(5, dtype=torch.uint8)}, {"tokens": [12]})
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(ValueError, match=f"{path} (is cut off|was altered|was written)|got .* in {path}"):
            read_tensors(path)
    path.write_bytes(whole)
    read_tensors(path)


def test_random_damage_is_refused(tmp_path):
    path, chance = tmp_path / "a", random.Random(0)
    write_tensors(path, {"x": torch.randn(70, 130), "y": torch.randn(31).bfloat16()}, METADATA)
    whole = path.read_bytes()
    for _ in range(1000):
        altered = bytearray(whole)
        start, length = chance.randrange(len(whole)), chance.randrange(1, 64)
        kind = chance.choice(["overwrite", "remove", "double", "cut off"])
        if kind == "overwrite":
            altered[start : start + length] = chance.randbytes(len(altered[start : start + length]))
        elif kind == "remove":
            del altered[start : start + length]
        elif kind == "double":
            altered[start:start] = altered[start : start + length]
        else:
            del altered[start:]
        if altered == whole:
            continue
        path.write_bytes(altered)
        with pytest.raises(ValueError, match="a"):
            read_tensors(path)


def rewritten(path: Path, tensors=None, **entries) -> None:
    """Rewrites the file with other tensors or another record, and keeps its seal."""
    record = cache_files._record(path, cache_files.safe_open(path, framework="pt").metadata())
    record["seal"] = cache_files.hash_json(record)
    save_file(tensors or load_file(path), path, {cache_files.HEADER_KEY: json.dumps(record | entries)})


def test_altered_metadata_is_refused_even_if_only_metadata_is_read(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    rewritten(tmp_path / "a", metadata=METADATA | {"scale": 0.2})
    for read in (read_tensors, read_metadata, lambda path: read_tensors(path, verify=False)):
        with pytest.raises(ValueError, match="a was altered: its header differs from what was written; remove it"):
            read(tmp_path / "a")


def test_altered_tensors_are_refused_unless_trusted(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    rewritten(tmp_path / "a", tensors=some_tensors() | {"scalar": torch.tensor(2.4)})
    with pytest.raises(ValueError, match="a was altered: its tensors differ from what was written; remove it"):
        read_tensors(tmp_path / "a")
    assert read_tensors(tmp_path / "a", verify=False)[0]["scalar"] == torch.tensor(2.4)
    assert read_metadata(tmp_path / "a") == METADATA


def test_renamed_tensors_are_refused(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.zeros(2), "y": torch.ones(2)}, {})
    rewritten(tmp_path / "a", tensors={"x": torch.ones(2), "y": torch.zeros(2)})
    with pytest.raises(ValueError, match="was altered"):
        read_tensors(tmp_path / "a")


@pytest.mark.parametrize(("step", "what_to_do"), [(1, "update deepseek-latent"), (-1, "write it again")])
def test_another_format_is_refused_with_what_to_do(tmp_path, monkeypatch, step, what_to_do):
    current = cache_files.FORMAT_VERSION
    with monkeypatch.context() as other:
        other.setattr(cache_files, "FORMAT_VERSION", current + step)
        write_tensors(tmp_path / "a", some_tensors(), METADATA)
    with pytest.raises(ValueError, match=rf"expected format {current}, got {current + step} in .*a; {what_to_do}"):
        read_metadata(tmp_path / "a")


def test_a_dtype_that_torch_does_not_have_is_refused(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.zeros(6, dtype=torch.uint8)}, {})
    data = (tmp_path / "a").read_bytes()
    entry, other = b'"dtype":"U8","shape":[6]', b'"dtype":"F6_E2M3","shape":[8]'
    assert entry in data
    size = int.from_bytes(data[:8], "little") + len(other) - len(entry)
    (tmp_path / "a").write_bytes(size.to_bytes(8, "little") + data[8:].replace(entry, other))
    with pytest.raises(ValueError, match=r"a is cut off, altered or not a safetensors file \(.*F6_E2M3\); write it"):
        read_tensors(tmp_path / "a")


def test_a_header_that_python_cannot_read_or_that_lacks_an_entry_is_refused(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    bare = {"format": cache_files.FORMAT_VERSION, "metadata": {}}
    bare |= {"seal": cache_files.hash_json(bare)}
    for text in ("[" * 10**5, "[]", "7", json.dumps(bare)):
        save_file(load_file(tmp_path / "a"), tmp_path / "b", {cache_files.HEADER_KEY: text})
        with pytest.raises(ValueError, match="b was altered: its header differs from what was written; remove it"):
            read_tensors(tmp_path / "b")
    rewritten(tmp_path / "a", format=10**3000)
    with pytest.raises(ValueError, match=r"expected format .*, got 1000+\.\.\.0+ in .*a; update deepseek-latent"):
        read_metadata(tmp_path / "a")


def test_files_of_other_programs_are_refused(tmp_path):
    save_file(some_tensors(), tmp_path / "plain")
    save_file(some_tensors(), tmp_path / "labelled", {"format": "pt"})
    for name in ("plain", "labelled"):
        with pytest.raises(ValueError, match=f"{name} was written by another program"):
            read_tensors(tmp_path / name)
    (tmp_path / "text").write_text("What is written here is no safetensors file. " * 9)
    (tmp_path / "nothing").touch()
    for name in ("text", "nothing"):
        with pytest.raises(ValueError, match=f"{name} is cut off, altered or not a safetensors file .*; write it"):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("read", [read_tensors, read_metadata])
def test_a_missing_file_and_a_folder_are_refused_by_name(read, tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"expected a file of cached tensors at {path}, there is none"):
            read(path)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"expected a folder to write a into, {tmp_path}/b is not one; create"):
        write_tensors(tmp_path / "b" / "a", {}, {})


def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(TypeError):
        write_tensors(tmp_path / "a", {}, {"ids": torch.zeros(2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=lambda error: error.__name__)
@pytest.mark.parametrize("step", ["save_file", "os.fsync", "os.replace"])
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(step, error, tmp_path, monkeypatch):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)

    def interrupted(*args, **kwargs):
        raise error

    with monkeypatch.context() as now:
        now.setattr(f"deepseek_latent.whole_files.{step}", interrupted)
        with pytest.raises(error):
            write_tensors(tmp_path / "a", {"x": torch.zeros(9)}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert equal(read_tensors(tmp_path / "a")[0], some_tensors())


@pytest.mark.parametrize("order", ["replaced, then opened", "opened, then replaced", "replaced between its two parts"])
def test_a_file_replaced_while_it_is_opened_is_read_as_one_version(tmp_path, monkeypatch, order):
    path, opened, attempts = tmp_path / "a", cache_files.safe_open, []
    write_tensors(path, {"x": torch.zeros(9)}, {"value": 0})

    def open_while_it_is_replaced(*arguments, **options):
        attempts.append(order)
        if len(attempts) > 1:
            return opened(*arguments, **options)
        before = opened(*arguments, **options)
        write_tensors(path, {"x": torch.ones(5)}, {"value": 1})
        if order == "replaced between its two parts":
            raise RuntimeError("file size <5> is smaller than the required mapping size <9>")
        return before if order == "opened, then replaced" else opened(*arguments, **options)

    monkeypatch.setattr(cache_files, "safe_open", open_while_it_is_replaced)
    tensors, metadata = read_tensors(path)
    assert (tensors["x"].tolist(), metadata, len(attempts)) == ([1.0] * 5, {"value": 1}, 2)


def test_a_replacement_of_the_same_size_and_time_is_another_file(tmp_path, monkeypatch):
    path, opened, attempts = tmp_path / "a", cache_files.safe_open, []
    write_tensors(path, {"x": torch.zeros(9)}, {"value": 0})
    written = os.stat(path).st_mtime_ns

    def open_and_replace(*arguments, **options):
        attempts.append(opened(*arguments, **options))
        if len(attempts) == 1:
            write_tensors(path, {"x": torch.ones(9)}, {"value": 1})
            os.utime(path, ns=(written, written))
        return attempts[-1]

    monkeypatch.setattr(cache_files, "safe_open", open_and_replace)
    tensors, metadata = read_tensors(path)
    assert (tensors["x"].tolist(), metadata) == ([1.0] * 9, {"value": 1})


def test_two_processes_may_write_a_file_at_the_same_time_while_others_read_it(tmp_path):
    program = """
        import sys, torch
        from deepseek_latent.cache.files import write_tensors
        path, value = sys.argv[1], int(sys.argv[2])
        for _ in range(20):
            write_tensors(path, {"x": torch.full((5000 * value,), value)}, {"value": value})
    """
    writers = [run_python(program, tmp_path / "a", value) for value in (1, 2)]
    seen = []
    while not (tmp_path / "a").exists():
        assert writers[0].poll() is None
        time.sleep(0.01)
    while any(writer.poll() is None for writer in writers):
        with contextlib.suppress(FileNotFoundError):
            tensors, metadata = read_tensors(tmp_path / "a")
            value = metadata["value"]
            assert tensors["x"].shape == (5000 * value,)
            assert tensors["x"].eq(value).all()
            seen.append(value)
        # leave the processor to the writers
        time.sleep(0.01)
    assert all(writer.returncode == 0 for writer in writers)
    assert set(seen) == {1, 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
