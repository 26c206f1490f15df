"""Compares the files of a checkpoint with its config.json, reading only the headers of the files."""

import copy
import reprlib
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from ..configuration_deepseek_v2 import DeepseekFirstUploadConfig, DeepseekV2Config
from ..experts.names import shapes_in_files
from ..json_files import read_json, why_absent
from ..modeling_deepseek_v2 import (
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
    DeepseekV2Model,
)
from .places import download, local_or_hub
from .progress import track_briefly

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MODEL_CLASSES = (
    DeepseekV2Model,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
)
# DeepseekForCausalLM is the name in the first upload of the release
_ARCHITECTURES = {model.__name__: model for model in MODEL_CLASSES} | {"DeepseekForCausalLM": DeepseekV2ForCausalLM}
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
# how the names of routers end, here and in DeepSeek's inference code
ROUTERS = (".mlp.gate.weight", ".ffn.gate.weight")
_FLAGS_OF_GENERATION = ("output_attentions", "output_hidden_states", "use_cache", "return_dict_in_generate")
# file name: its tensors by name, or None if it is unreadable
Headers = dict[str, "dict[str, StoredTensor] | None"]


class StoredTensor(NamedTuple):
    """A tensor as the header of its file describes it. `dtype` is the name in safetensors, such as "BF16"."""

    shape: tuple[int, ...]
    dtype: str
    file: str


class CheckpointReport(NamedTuple):
    """The result of checking a folder. The files fit config.json if `problems` is empty."""

    num_tensors: int
    num_files: int
    problems: list[str]


def read_config(source: str) -> DeepseekV2Config:
    """The config of a folder, a config.json or a hub id. Raises ValueError if it is not that of a DeepSeek-V2."""
    place = local_or_hub(source)
    place = place if isinstance(place, Path) else download(place, ["config.json"])
    file = place / "config.json" if place.is_dir() else place
    if not file.is_file():
        raise ValueError(f"expected a checkpoint folder, got {source}, {why_absent(place / 'config.json')}.")
    return config_from_json(read_json(file), source)


def config_from_json(given: dict, place: str | Path) -> DeepseekV2Config:
    """The config of a DeepSeek-V2 from the content of its config.json. Raises ValueError that names `place`."""
    if given.get("model_type") not in (DeepseekV2Config.model_type, DeepseekFirstUploadConfig.model_type):
        raise ValueError(
            f"model_type must be 'deepseek_v2', got {given.get('model_type')!r} in {place}; name a DeepSeek-V2, "
            "or convert this model to one (deepseek-latent convert gqa-to-mla)."
        )
    try:
        return DeepseekV2Config.from_dict(given)
    except ValueError as error:
        raise ValueError(f"expected a config.json of DeepSeek-V2 in {place}, got: {error}") from error


def architecture_of(config: DeepseekV2Config) -> str:
    """The class named in `architectures`, by default the language model."""
    return config.architectures[0] if config.architectures else DeepseekV2ForCausalLM.__name__


def checkpoint_tensors(
    config: DeepseekV2Config, architecture: str = "DeepseekV2ForCausalLM"
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the official layout, in the model's order, without allocating any.

    The model stacks a layer's experts in two parameters, files hold three matrices per expert. A tensor that is tied to
    another one is left out.
    """
    if architecture not in _ARCHITECTURES:
        raise ValueError(f"architectures must name one of {', '.join(_ARCHITECTURES)}, got {architecture!r}.")
    with torch.device("meta"):
        # the model changes its config
        model = _ARCHITECTURES[architecture](copy.deepcopy(config))
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name not in model.all_tied_weights_keys:
            tensors.update(shapes_in_files(name, tuple(tensor.shape)))
    return tensors


def has_weights(folder: Path) -> bool:
    return (folder / INDEX_FILE).is_file() or any(folder.glob("model*.safetensors"))


def check_checkpoint(folder: Path, config: DeepseekV2Config) -> CheckpointReport:
    """Compares names, shapes and dtypes in the headers of the files with those that `config` requires."""
    if "quantization_config" in config.to_dict():
        raise ValueError(f"expected unquantized weights, got a quantization_config in {folder}; check its source.")
    headers, problems = read_headers(folder)
    stored, duplicates = merge_headers(headers)
    problems += duplicates
    expected = checkpoint_tensors(config, architecture_of(config))
    optional = _optional_tensors(config)
    floats = list(SAFETENSORS_DTYPES.values())
    missing = [f"{name} is missing" for name in expected if name not in stored]
    # a long list of names would hide the one unreadable file
    if missing and None in headers.values():
        missing = [f"{len(missing):,} tensors are missing, including those of the unreadable files"]
    problems += missing
    for name, tensor in stored.items():
        shape = expected.get(name, optional.get(name))
        if shape is None:
            problems.append(f"{name} is unexpected, in {tensor.file}")
            continue
        if tensor.shape != shape:
            problems.append(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}, in {tensor.file}")
        allowed = [SAFETENSORS_DTYPES[config.dtype]] if config.dtype in SAFETENSORS_DTYPES else floats
        # transformers 5.24 saves routers in float32, whatever the dtype of the model
        allowed = [*allowed, "F32"] if name.endswith(ROUTERS) else allowed
        if tensor.dtype not in allowed:
            problems.append(f"{name} has dtype {tensor.dtype}, expected {' or '.join(allowed)}, in {tensor.file}")
    return CheckpointReport(len(stored), len(headers), problems)


def _optional_tensors(config: DeepseekV2Config) -> dict[str, tuple[int, ...]]:
    """Tensors that a checkpoint can leave out, because they are tied to others."""
    return {"lm_head.weight": (config.vocab_size, config.hidden_size)} if config.tie_word_embeddings else {}


def read_headers(folder: Path) -> tuple[Headers, list[str]]:
    """The headers of the files that a loader would open, and the problems of these files and their index."""
    if not (folder / INDEX_FILE).is_file():
        if not (folder / WEIGHTS_FILE).is_file():
            return {}, [f"{INDEX_FILE} is absent, and a loader needs it to find the shards; download it again"]
        return _read_files(folder, [WEIGHTS_FILE])
    try:
        index = read_json(folder / INDEX_FILE)
    except ValueError as error:
        return {}, [f"{INDEX_FILE} is not JSON with a weight_map from tensor to file: {error}"]
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not all(isinstance(file, str) for file in placed.values()):
        return {}, [f"{INDEX_FILE} is not JSON with a weight_map from tensor to file; download it again"]
    outside = [file for file in placed.values() if Path(file).name != file]
    if outside:
        return {}, [f"{INDEX_FILE} names {outside[0]!r}, expected files in the same folder"]
    headers, problems = _read_files(folder, sorted(set(placed.values())))
    if (folder / WEIGHTS_FILE).is_file():
        problems.append(
            f"{WEIGHTS_FILE} and {INDEX_FILE} both exist, and loaders disagree which one to read; remove one"
        )
    for name, file in placed.items():
        if headers[file] is not None and name not in headers[file]:
            problems.append(f"{name} is not in {file}, where {INDEX_FILE} places it")
    for file, header in headers.items():
        problems += [
            f"{name} is in {file}, but {INDEX_FILE} does not name it" for name in header or () if name not in placed
        ]
    if not isinstance(index.get("metadata"), dict):
        problems.append(f"{INDEX_FILE} has no metadata, without which transformers cannot read it; add an empty object")
    return headers, problems


def read_generation_config(folder: Path) -> dict:
    """The generation_config.json of a checkpoint, or {}. Raises ValueError if transformers could not read it."""
    file = folder / "generation_config.json"
    if not file.exists():
        return {}
    content = read_json(file)
    try:
        for name in _FLAGS_OF_GENERATION:
            # passed to the model as they are
            if not isinstance(content.get(name), bool | None):
                raise ValueError(f"{name} must be true, false or null, got {reprlib.repr(content[name])}")
        GenerationConfig.from_dict(dict(content))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected the settings of generate() in {file}, got: {error}; correct or remove it."
        ) from error
    return content


def check_readable(folder: Path) -> dict[str, StoredTensor]:
    """The tensors in the headers of a folder's files. Raises ValueError if a loader could not open these files."""
    read_generation_config(folder)
    headers, problems = read_headers(folder)
    if problems:
        more = f", and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        raise ValueError(
            f"expected readable weights in {folder}, got: {problems[0]}{more} (deepseek-latent inspect lists all)."
        )
    return merge_headers(headers)[0]


def merge_headers(headers: Headers) -> tuple[dict[str, StoredTensor], list[str]]:
    """The tensors of all files by name, and a problem for each one that is in two files."""
    stored, problems = {}, []
    for header in headers.values():
        for name, tensor in (header or {}).items():
            if name in stored:
                problems.append(f"{name} is in two files, {stored[name].file} and {tensor.file}")
            stored[name] = tensor
    return stored, problems


def common_dtype(dtypes: dict[str, str], folder: Path) -> torch.dtype:
    """The dtype of all tensors, given its name in safetensors for each; routers may be in float32 instead.

    Raises ValueError if there are several, because config.json has room for one.
    """
    in_float32 = {name for name, dtype in dtypes.items() if dtype == "F32"}
    only_routers = all(name.endswith(ROUTERS) for name in in_float32)
    # a tensor of each dtype
    example = {dtype: name for name, dtype in dtypes.items() if not (only_routers and name in in_float32)}
    if len(example) > 1:
        found = " and ".join(f"{dtype} ({name})" for dtype, name in example.items())
        raise ValueError(
            f"expected one dtype in the files of {folder}, got {found}; load the model in one dtype and save it again."
        )
    return next(dtype for dtype, stored in SAFETENSORS_DTYPES.items() if stored in example)


def _read_files(folder: Path, files: list[str]) -> tuple[Headers, list[str]]:
    headers, problems = dict.fromkeys(files), []
    for file in track_briefly(files, "reading headers"):
        if not (folder / file).is_file():
            problems.append(f"{file} is absent, but {INDEX_FILE} names it")
            continue
        try:
            with safe_open(folder / file, framework="pt") as tensors:
                names = tensors.keys()
                slices = [tensors.get_slice(name) for name in names]
                entries = [StoredTensor(tuple(entry.get_shape()), entry.get_dtype(), file) for entry in slices]
                headers[file] = dict(zip(names, entries))
        except SafetensorError as error:
            problems.append(
                f"{file} is cut off or not a safetensors file ({error}); download it again (or git lfs pull)"
            )
    return headers, problems
