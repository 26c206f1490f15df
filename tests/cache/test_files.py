"""Files of cached tensors are read as they were written or refused, and a model's fingerprint tells it from others."""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import textwrap
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM
from deepseek_latent.cache import files as cache_files
from deepseek_latent.cache.files import fingerprint, read_metadata, read_tensors, write_tensors
from tests.support import V2, seeded, tiny_model

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


# fingerprint: what it must not see


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_and_its_reload_have_one_fingerprint(dtype, tied, tmp_path):
    model = tiny_model(dtype, tie_word_embeddings=tied)
    before = fingerprint(model)
    model.save_pretrained(tmp_path)
    assert fingerprint(DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == before == fingerprint(model)


def test_the_fingerprint_is_the_same_in_another_process():
    program = "from tests.support import tiny_model; from deepseek_latent.cache.files import fingerprint as f"
    other = run_python(f"{program}; print(f(tiny_model()))")
    assert other.communicate()[0].split()[-1] == fingerprint(tiny_model())


def test_tied_and_untied_models_of_equal_weights_have_one_fingerprint():
    untied, tied = tiny_model(), tiny_model(tie_word_embeddings=True)
    untied.load_state_dict(tied.state_dict())
    assert fingerprint(untied) == fingerprint(tied)


def test_nothing_but_what_changes_the_cache_enters_the_fingerprint():
    model = tiny_model()
    before = fingerprint(model)
    model.set_attn_implementation("eager")
    model.config.name_or_path = "elsewhere"
    model.config.problem_type = "regression"
    model.generation_config.temperature = 0.1
    model.train()
    # not persistent: made from the configuration
    model.model.rotary_emb.inv_freq.mul_(2)
    assert fingerprint(model) == before


# fingerprint: what it must see

NEUTRAL = {
    "attention_dropout",
    "aux_loss_alpha",
    "bos_token_id",
    "classifier_dropout",
    "eos_token_id",
    "ep_size",
    "initializer_range",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "seq_aux",
    "tie_word_embeddings",
    "use_cache",
}
GENERIC = {field.name for field in fields(PreTrainedConfig)}
OWN_FIELDS = [field.name for field in fields(DeepseekV2Config) if field.name not in GENERIC]


@pytest.mark.parametrize("name", OWN_FIELDS)
def test_a_config_field_enters_the_fingerprint_unless_no_cached_number_depends_on_it(name):
    model = torch.nn.Linear(1, 1)
    # by hand, since no single field of a valid configuration can take every value
    values = dict.fromkeys(OWN_FIELDS, 1)
    model.config = type("Config", (), {"to_dict": lambda self: values})()
    before = fingerprint(model)
    values[name] = 2
    assert (fingerprint(model) == before) == (name in NEUTRAL)


def negate(weight):
    weight.neg_()


def swap_experts(weight):
    weight[[2, 5]] = weight[[5, 2]]


def flip_one_bit(weight):
    weight.view(-1).view(torch.uint8)[-1] ^= 1


def permute_rows(weight):
    weight.copy_(weight.flip(-2))


def permute_columns(weight):
    weight.copy_(weight.roll(1, dims=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("change", [negate, swap_experts, flip_one_bit, permute_rows, permute_columns])
def test_a_changed_weight_changes_the_fingerprint(change, dtype):
    model = tiny_model(dtype)
    before = fingerprint(model)
    with torch.no_grad():
        change(model.model.layers[1].mlp.experts.gate_up_proj.data)
    assert fingerprint(model) != before


def test_every_weight_enters_the_fingerprint():
    model = tiny_model()
    seen = {fingerprint(model)}
    for parameter in model.parameters():
        parameter.data.view(-1)[-1] += 1
        seen.add(fingerprint(model))
    assert len(seen) == 1 + len(list(model.parameters()))


def test_another_dtype_is_another_fingerprint():
    assert fingerprint(tiny_model().half()) != fingerprint(tiny_model().bfloat16())


def test_the_same_numbers_under_other_rope_are_another_fingerprint():
    other = V2["rope_scaling"] | {"factor": 8.0}
    assert fingerprint(tiny_model(rope_scaling=other)) != fingerprint(tiny_model())


def test_a_persistent_buffer_enters_the_fingerprint():
    model = tiny_model()
    model.register_buffer("bias", torch.zeros(3))
    before = fingerprint(model)
    model.bias[1] = 1
    assert fingerprint(model) != before


def test_weights_on_the_meta_device_are_refused():
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is on the meta device; load it"):
        fingerprint(tiny_model().to("meta"))


def test_a_weight_spread_over_processes_counts_as_the_whole():
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    model = tiny_model()
    before = fingerprint(model)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = DeviceMesh("cpu", [0])
        model.lm_head.weight = torch.nn.Parameter(distribute_tensor(model.lm_head.weight.data, mesh, [Shard(0)]))
        assert fingerprint(model) == before
    finally:
        torch.distributed.destroy_process_group()


def test_a_tensor_made_of_tensors_counts_by_what_is_inside():
    def made_of(scale):
        model = tiny_model()
        model.lm_head.weight = torch.nn.Parameter(TwoTensor(torch.ones(4), torch.full((4,), scale)))
        return fingerprint(model)

    assert made_of(2.0) == made_of(2.0)
    assert made_of(2.0) != made_of(3.0)


# fingerprint: adapters


@pytest.fixture
def adapted():
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_b_proj", "kv_b_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model(), config).eval()


def scaled(model: torch.nn.Module, factor: float) -> None:
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scaling["default"] *= factor


def test_an_adapter_changes_the_fingerprint_whether_active_merged_disabled_or_of_other_scaling(adapted):
    seen = [fingerprint(tiny_model()), fingerprint(adapted)]
    with adapted.disable_adapter():
        seen.append(fingerprint(adapted))
    scaled(adapted, 2.0)
    seen.append(fingerprint(adapted))
    scaled(adapted, 0.5)
    adapted.merge_adapter()
    seen.append(fingerprint(adapted))
    adapted.unmerge_adapter()
    assert len(set(seen)) == len(seen)


def test_a_second_adapter_changes_the_fingerprint_when_it_becomes_active(adapted):
    torch.manual_seed(2)
    adapted.add_adapter("second", LoraConfig(r=2, target_modules=["q_b_proj"], init_lora_weights=False))
    first = fingerprint(adapted)
    adapted.set_adapter("second")
    assert fingerprint(adapted) != first
    adapted.set_adapter("default")
    assert fingerprint(adapted) == first
    adapted.delete_adapter("second")


def test_a_reloaded_adapter_has_the_fingerprint_of_the_saved_one(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    assert fingerprint(PeftModel.from_pretrained(tiny_model(), tmp_path)) == fingerprint(adapted)


# the checksum


def in_plain_python(tensor: torch.Tensor) -> list[int]:
    """The sums of `_checksums` by Python's integers."""
    data = bytes(as_bytes(tensor).tolist())
    data += bytes(-len(data) % 4096)
    keys = [key % 2**64 for key in cache_files._keys(torch.device("cpu")).tolist()]
    sums = []
    for start in range(0, len(data), 4096):
        total = 0
        for i, key in enumerate(keys):
            word = int.from_bytes(data[start + 8 * i : start + 8 * i + 8], "little", signed=True)
            total += (word ^ (word >> 29)) * key
        sums.append((total + 2**63) % 2**64 - 2**63)
    return sums


def test_the_checksum_is_what_its_description_says():
    tensor = torch.randn(3, 733)
    assert cache_files._checksums(tensor).tolist() == in_plain_python(tensor)


def test_the_checksum_never_changes_lest_files_become_unreadable():
    tensor = torch.arange(3000, dtype=torch.int32)
    assert cache_files._digest({"x": tensor}) == "772ed9c4e56e05c6c9dde4d61832df3cf6a7f8268d7b19160d540036f9497f82"


def test_the_checksum_does_not_depend_on_the_number_of_threads():
    tensor, threads = torch.randn(600, 1001), torch.get_num_threads()
    with contextlib.ExitStack() as after:
        after.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        alone = cache_files._checksums(tensor)
        torch.set_num_threads(3)
        assert torch.equal(cache_files._checksums(tensor), alone)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]
)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (7, 0, 2), (4097,), (513, 8)], ids=str)
def test_any_shape_and_dtype_has_a_checksum_that_sees_its_last_bit(shape, dtype):
    tensor = torch.randint(0, 2, shape).to(dtype)
    before = cache_files._digest({"x": tensor})
    assert before == cache_files._digest({"x": tensor.clone()})
    if tensor.numel():
        tensor.view(-1).view(torch.uint8)[-1] ^= 1
        assert before != cache_files._digest({"x": tensor})


@pytest.mark.parametrize("columns", [70, 64], ids="{} columns".format)
def test_the_memory_layout_does_not_enter_the_checksum(columns):
    base = torch.randn(64, columns)
    # one element behind where a word may start
    shifted = torch.empty(base.numel() + 1)[1:].view_as(base).copy_(base)
    strided = torch.empty(columns, 64).t().copy_(base)
    assert {cache_files._digest({"x": x}) for x in (shifted, strided)} == {cache_files._digest({"x": base})}


def test_name_shape_and_dtype_enter_the_digest():
    zeros = torch.zeros(2, 3)
    different = [{"x": zeros}, {"y": zeros}, {"x": zeros.t()}, {"x": zeros.int()}, {"x": torch.zeros(2, 4)}]
    different += [{"x": zeros, "y": zeros}, {}]
    assert len({cache_files._digest(tensors) for tensors in different}) == len(different)


def distinct_sums(rows: torch.Tensor) -> bool:
    assert rows[0].nbytes == 4096
    return cache_files._checksums(rows).unique().numel() == len(rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_no_two_changes_of_two_signs_have_one_checksum(dtype):
    row = torch.randn(4096 // dtype.itemsize).to(dtype)
    pairs = list(itertools.combinations(range(48), 2))
    rows = row.repeat(len(pairs) + 1, 1)
    for changed, pair in zip(rows, pairs):
        changed[list(pair)] *= -1
    assert distinct_sums(rows)


def test_no_two_exchanges_of_two_elements_have_one_checksum():
    row = torch.arange(2048, dtype=torch.int16)
    pairs = list(itertools.combinations(range(48), 2))
    rows = row.repeat(len(pairs) + 1, 1)
    for changed, (i, j) in zip(rows, pairs):
        changed[[i, j]] = changed[[j, i]]
    assert distinct_sums(rows)


def test_no_two_single_bits_have_one_checksum():
    rows = torch.zeros(4097, 4096, dtype=torch.uint8)
    for place in range(4096):
        rows[place, place] = 1 << place % 8
    assert distinct_sums(rows)


def test_a_checksum_allocates_little_beside_the_tensor():
    class Allocated(TorchDispatchMode):
        """The largest storage that no argument had."""

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
        cache_files._checksums(tensor)
    assert 0 < allocated.nbytes <= torch.get_num_threads() << 19


# files


def test_tensors_and_metadata_come_back_as_they_were(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    tensors, metadata = read_tensors(tmp_path / "a")
    assert equal(tensors, some_tensors())
    assert metadata == METADATA == read_metadata(tmp_path / "a")


def test_a_file_may_hold_no_tensor(tmp_path):
    write_tensors(tmp_path / "a", {}, {})
    assert read_tensors(str(tmp_path / "a")) == ({}, {})


def test_tensors_that_are_not_contiguous_or_need_gradients_are_written_too(tmp_path):
    tensors = {"turned": torch.randn(3, 5).t(), "trained": torch.nn.Parameter(torch.randn(3))}
    write_tensors(tmp_path / "a", tensors, {})
    assert equal(read_tensors(tmp_path / "a")[0], {name: x.detach() for name, x in tensors.items()})


def test_the_file_is_a_safetensors_file(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    assert equal(load_file(tmp_path / "a"), some_tensors())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_the_mapped_file_and_writing_to_them_leaves_it_alone(tmp_path):
    write_tensors(tmp_path / "mapped", {"x": torch.zeros(1 << 16)}, {})
    tensor = read_tensors(tmp_path / "mapped", verify=False)[0]["x"]
    places = [line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if "/mapped" in line]
    ranges = [[int(end, 16) for end in place.split("-")] for place in places]
    assert any(start <= tensor.data_ptr() < end for start, end in ranges)
    tensor.fill_(1)
    assert not read_tensors(tmp_path / "mapped")[0]["x"].any()


def test_a_replaced_or_removed_file_leaves_what_was_read_alone(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.ones(1 << 16)}, {})
    read = read_tensors(tmp_path / "a", verify=False)[0]["x"]
    write_tensors(tmp_path / "a", {"x": torch.zeros(1)}, {})
    (tmp_path / "a").unlink()
    assert read.eq(1).all()


def test_a_flip_of_any_single_bit_is_refused(tmp_path):
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
    """The file with other tensors or another record, under the old seal, by whoever can write safetensors files."""
    record = cache_files._record(path, cache_files.safe_open(path, framework="pt").metadata())
    record["seal"] = cache_files._hash(record)
    save_file(tensors or load_file(path), path, {cache_files.KEY: json.dumps(record | entries)})


def test_altered_metadata_is_refused_also_where_only_it_is_read(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    rewritten(tmp_path / "a", metadata=METADATA | {"scale": 0.2})
    for read in (read_tensors, read_metadata, lambda path: read_tensors(path, verify=False)):
        with pytest.raises(ValueError, match="a was altered: its header is not what was written there; remove it"):
            read(tmp_path / "a")


def test_altered_tensors_are_refused_unless_trusted(tmp_path):
    write_tensors(tmp_path / "a", some_tensors(), METADATA)
    rewritten(tmp_path / "a", tensors=some_tensors() | {"scalar": torch.tensor(2.4)})
    with pytest.raises(ValueError, match="a was altered: its tensors are not what was written there; remove it"):
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
    current = cache_files.FORMAT
    with monkeypatch.context() as other:
        other.setattr(cache_files, "FORMAT", current + step)
        write_tensors(tmp_path / "a", some_tensors(), METADATA)
    with pytest.raises(ValueError, match=rf"expected format {current}, got {current + step} in .*a; {what_to_do}"):
        read_metadata(tmp_path / "a")


def test_files_of_others_are_refused(tmp_path):
    save_file(some_tensors(), tmp_path / "plain")
    save_file(some_tensors(), tmp_path / "labelled", {"format": "pt"})
    for name in ("plain", "labelled"):
        with pytest.raises(ValueError, match=f"{name} was written by something else"):
            read_tensors(tmp_path / name)
    (tmp_path / "text").write_text("What is written here is no safetensors file. " * 9)
    (tmp_path / "nothing").touch()
    for name in ("text", "nothing"):
        with pytest.raises(ValueError, match=f"{name} is cut off, altered or no safetensors file .*; write it anew"):
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("read", [read_tensors, read_metadata])
def test_a_missing_file_and_a_folder_are_refused_by_name(read, tmp_path):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"there is none at {path}"):
            read(path)


def test_a_missing_folder_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"expected a folder to write a into, {tmp_path}/b is none; create"):
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
        now.setattr(f"deepseek_latent.cache.files.{step}", interrupted)
        with pytest.raises(error):
            write_tensors(tmp_path / "a", {"x": torch.zeros(9)}, {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
    assert equal(read_tensors(tmp_path / "a")[0], some_tensors())


@pytest.mark.parametrize("order", ["replaced, then opened", "opened, then replaced", "replaced between its two parts"])
def test_a_file_replaced_while_it_is_opened_is_read_as_it_then_is(tmp_path, monkeypatch, order):
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


def test_two_processes_may_write_one_file_at_once_while_others_read_it(tmp_path):
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
        # the writers need the processor more
        time.sleep(0.01)
    assert all(writer.returncode == 0 for writer in writers)
    assert set(seen) == {1, 2}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
