"""Checkpoints load from and save to official files, and an incomplete backbone is refused, never initialized."""

import copy
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV2Model
from deepseek_latent.commands.__main__ import main
from tests.support import LITE, NATIVE, V2, official_state_dict, random_ids, relative_error, seeded, tiny_model

VARIANTS = {
    "V2": V2,
    "Lite": LITE,
    "dense": V2 | {"n_routed_experts": None},
    "no shared experts": V2 | {"n_shared_experts": None},
    "every other layer": V2 | {"moe_layer_freq": 2, "first_k_dense_replace": 0},
    "biases": V2 | {"attention_bias": True},
}
every_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# what each class adds to the backbone, and what it does not read from an official file
CLASSES = {
    AutoModelForCausalLM: (set(), set()),
    AutoModel: (set(), {"lm_head.weight"}),
    AutoModelForSequenceClassification: ({"score.weight"}, {"lm_head.weight"}),
    AutoModelForTokenClassification: ({"score.weight", "score.bias"}, {"lm_head.weight"}),
}
every_class = pytest.mark.parametrize("auto_class", CLASSES, ids=lambda auto_class: auto_class.__name__)


def official_tensors(config: DeepseekV2Config, dtype: torch.dtype, seed: int = 0) -> dict[str, Tensor]:
    """Makes a checkpoint with the release's names and shapes, without any model class; norms are near 1."""
    d, h, c, a = config.hidden_size, config.num_attention_heads, config.kv_lora_rank, config.q_lora_rank
    n, r, v = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim

    def mlp(prefix: str, width: int) -> dict[str, tuple[int, ...]]:
        shapes = {"gate": (width, d), "up": (width, d), "down": (d, width)}
        return {f"{prefix}.{name}_proj.weight": shape for name, shape in shapes.items()}

    shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (config.vocab_size, d)
    for layer in range(config.num_hidden_layers):
        at, ff = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.mlp"
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (d,)
        shapes[f"model.layers.{layer}.post_attention_layernorm.weight"] = (d,)
        if a is None:
            shapes[f"{at}.q_proj.weight"] = (h * (n + r), d)
        else:
            shapes[f"{at}.q_a_proj.weight"], shapes[f"{at}.q_a_layernorm.weight"] = (a, d), (a,)
            shapes[f"{at}.q_b_proj.weight"] = (h * (n + r), a)
        shapes[f"{at}.kv_a_proj_with_mqa.weight"], shapes[f"{at}.kv_a_layernorm.weight"] = (c + r, d), (c,)
        shapes[f"{at}.kv_b_proj.weight"], shapes[f"{at}.o_proj.weight"] = (h * (n + v), c), (d, h * v)
        if config.attention_bias:
            biased = {"kv_a_proj_with_mqa": c + r, "o_proj": d} | ({} if a is None else {"q_a_proj": a})
            shapes |= {f"{at}.{name}.bias": (width,) for name, width in biased.items()}
        if not config.is_moe_layer(layer):
            shapes |= mlp(ff, config.intermediate_size)
            continue
        shapes[f"{ff}.gate.weight"] = (config.n_routed_experts, d)
        for expert in range(config.n_routed_experts):
            shapes |= mlp(f"{ff}.experts.{expert}", config.moe_intermediate_size)
        if config.n_shared_experts is not None:
            shapes |= mlp(f"{ff}.shared_experts", config.n_shared_experts * config.moe_intermediate_size)

    generator = seeded(seed)
    tensors = {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: (t + 1 if "norm" in name else t).to(dtype) for name, t in tensors.items()}


def write_checkpoint(folder: Path, config: DeepseekV2Config, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures = ["DeepseekV2ForCausalLM"]
    config.dtype = next(iter(tensors.values())).dtype
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def files_of(folder: Path) -> dict[str, Tensor]:
    """All tensors in the safetensors files of a folder, by name."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert {name: t.dtype for name, t in one.items()} == {name: t.dtype for name, t in other.items()}
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def logits_of(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model.eval()(random_ids(2, 11)).logits


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The tensors of a small official checkpoint in float32."""
    return official_tensors(DeepseekV2Config(**V2), torch.float32)


@pytest.fixture
def checkpoint(tmp_path, official):
    """Writes a folder with the official tensors, without some or with changed ones, and returns its path."""

    def write(without: str | None = None, changed: dict[str, Tensor] | None = None) -> Path:
        tensors = {name: t for name, t in official.items() if without is None or without not in name}
        assert without is None or len(tensors) < len(official)
        return write_checkpoint(tmp_path / "checkpoint", DeepseekV2Config(**V2), tensors | (changed or {}))

    return write


# loading and saving


@every_class
@every_variant
def test_official_checkpoint_loads_completely(fields, auto_class, tmp_path):
    config = DeepseekV2Config(**fields)
    tensors = official_tensors(config, torch.float32)
    folder = write_checkpoint(tmp_path, config, tensors)
    model, info = auto_class.from_pretrained(folder, output_loading_info=True)
    new, left_over = CLASSES[auto_class]
    assert (info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"]) == (new, left_over, set())
    assert type(model).__module__.startswith("deepseek_latent")
    backbone = model.base_model.state_dict()
    assert torch.equal(
        backbone["layers.0.self_attn.kv_b_proj.weight"], tensors["model.layers.0.self_attn.kv_b_proj.weight"]
    )
    moe_layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    for layer, expert in [(layer, expert) for layer in moe_layers for expert in (0, 2, 11)]:
        ff, f = f"layers.{layer}.mlp.experts", config.moe_intermediate_size
        gate, up, down = (tensors[f"model.{ff}.{expert}.{x}_proj.weight"] for x in ("gate", "up", "down"))
        assert torch.equal(backbone[f"{ff}.gate_up_proj"][expert, :f], gate)
        assert torch.equal(backbone[f"{ff}.gate_up_proj"][expert, f:], up)
        assert torch.equal(backbone[f"{ff}.down_proj"][expert], down)


@pytest.mark.parametrize("shard_size", [None, "40KB"], ids=["one file", "sharded"])
@every_dtype
@every_variant
def test_saving_writes_the_official_files_again(fields, dtype, shard_size, tmp_path):
    config = DeepseekV2Config(**fields)
    tensors = official_tensors(config, dtype)
    write_checkpoint(tmp_path / "official", config, tensors)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "official", dtype="auto")
    model.save_pretrained(tmp_path / "saved", **({} if shard_size is None else {"max_shard_size": shard_size}))
    assert_same_tensors(files_of(tmp_path / "saved"), tensors)
    index = tmp_path / "saved/model.safetensors.index.json"
    assert index.exists() == (shard_size is not None)
    if shard_size is not None:
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map.keys() == tensors.keys()
        assert len(set(weight_map.values())) > 3
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto")
        assert torch.equal(logits_of(again), logits_of(model))


def test_model_that_was_never_loaded_saves_official_names(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    assert files_of(tmp_path).keys() == official_tensors(model.config, torch.float32).keys()


@pytest.mark.parametrize("model_class", [DeepseekV2Model, DeepseekV2ForCausalLM])
def test_backbone_saved_alone_loads_into_every_class(model_class, tmp_path):
    whole = tiny_model()
    whole.model.save_pretrained(tmp_path)
    model, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] <= {"lm_head.weight"}
    assert not info["unexpected_keys"]
    ids = random_ids(1, 7)
    assert torch.equal(model.base_model(ids).last_hidden_state, whole.model(ids).last_hidden_state)


@pytest.mark.parametrize(
    "auto_class", [AutoModelForSequenceClassification, AutoModelForTokenClassification], ids=lambda c: c.__name__
)
def test_classifier_saves_and_loads_itself(auto_class, checkpoint, tmp_path):
    model = auto_class.from_pretrained(checkpoint(), num_labels=5)
    model.save_pretrained(tmp_path / "saved")
    again, info = auto_class.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(again.eval()(random_ids(1, 7)).logits, model.eval()(random_ids(1, 7)).logits)


# transformers' own class


NATIVE_VARIANTS = {"V2": V2, "Lite": LITE}


@pytest.mark.parametrize("fields", NATIVE_VARIANTS.values(), ids=NATIVE_VARIANTS.keys())
def test_transformers_own_class_opens_what_we_save(fields, tmp_path):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    native, info = NATIVE.DeepseekV2ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(native).__module__.startswith("transformers.")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(logits_of(model), logits_of(native)) < 1e-5


@pytest.mark.parametrize("fields", NATIVE_VARIANTS.values(), ids=NATIVE_VARIANTS.keys())
def test_we_open_what_transformers_own_class_saves(fields, tmp_path):
    fields = fields | {"rope_scaling": V2["rope_scaling"] | {"rope_type": "yarn"}}
    native = NATIVE.DeepseekV2ForCausalLM(NATIVE.DeepseekV2Config(**copy.deepcopy(fields)))
    native.save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is DeepseekV2ForCausalLM
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert relative_error(logits_of(model), logits_of(native)) < 1e-5


# missing, misshapen and unexpected tensors


# what the file lacks, and what the message contains
MISSING = {
    "attention projection": ("layers.2.self_attn.o_proj.weight", ["layers.2.self_attn.o_proj.weight is missing"]),
    "layer norm": ("layers.0.input_layernorm.weight", ["layers.0.input_layernorm.weight is missing"]),
    "latent norm": ("layers.1.self_attn.kv_a_layernorm", ["layers.1.self_attn.kv_a_layernorm.weight is missing"]),
    "last norm": ("model.norm.weight", ["norm.weight is missing"]),
    "router": ("layers.1.mlp.gate.weight", ["layers.1.mlp.gate.weight is missing"]),
    "dense mlp": ("layers.0.mlp.up_proj.weight", ["layers.0.mlp.up_proj.weight is missing"]),
    "shared expert": ("layers.2.mlp.shared_experts.down", ["layers.2.mlp.shared_experts.down_proj.weight is missing"]),
    "embedding": ("embed_tokens", ["embed_tokens.weight is missing"]),
    "all experts of a layer": (
        "layers.1.mlp.experts.",
        [
            "layers.1.mlp.experts.*.{gate,up}_proj.weight is missing",
            "layers.1.mlp.experts.*.down_proj.weight is missing",
        ],
    ),
    "one up_proj": (
        "layers.1.mlp.experts.3.up_proj",
        ["layers.1.mlp.experts.3.up_proj.weight is missing"],
    ),
    "one down_proj": (
        "layers.1.mlp.experts.3.down_proj",
        ["layers.1.mlp.experts.3.down_proj.weight is missing"],
    ),
    "one expert": (
        "layers.2.mlp.experts.11.",
        ["layers.2.mlp.experts.11.down_proj.weight is missing"],
    ),
    "a whole layer": (
        "layers.2.",
        ["layers.2.self_attn.kv_b_proj.weight is missing", "layers.2.mlp.experts.*.down_proj.weight is missing"],
    ),
}


def assert_refused_with(parts: list[str], folder: Path, auto_class: type, **options) -> None:
    with pytest.raises(ValueError, match="does not hold this model's backbone") as refusal:
        auto_class.from_pretrained(folder, **options)
    assert [part for part in parts if part not in str(refusal.value)] == []
    assert "Complete or convert the checkpoint, or correct its config.json" in str(refusal.value)


@every_class
@pytest.mark.parametrize(("without", "parts"), MISSING.values(), ids=MISSING.keys())
def test_missing_backbone_tensor_is_an_error_that_names_it(without, parts, auto_class, checkpoint):
    assert_refused_with(parts, checkpoint(without), auto_class)


# shapes of replaced tensors in the file, and what the message contains
MISSHAPEN = {
    "projection": (
        {"model.layers.2.self_attn.o_proj.weight": (72, 71)},
        ["layers.2.self_attn.o_proj.weight has shape [72, 71], expected [72, 72]"],
    ),
    "transposed": (
        {"model.layers.0.mlp.down_proj.weight": (88, 72)},
        ["layers.0.mlp.down_proj.weight has shape [88, 72], expected [72, 88]"],
    ),
    "norm": ({"model.norm.weight": (71,)}, ["norm.weight has shape [71], expected [72]"]),
    "router": (
        {"model.layers.1.mlp.gate.weight": (11, 72)},
        ["layers.1.mlp.gate.weight has shape [11, 72], expected [12, 72]"],
    ),
    "embedding": (
        {"model.embed_tokens.weight": (95, 72)},
        ["embed_tokens.weight has shape [95, 72], expected [96, 72]"],
    ),
    "one up_proj": (
        {"model.layers.1.mlp.experts.3.up_proj.weight": (33, 72)},
        [
            "layers.1.mlp.experts.*.{gate,up}_proj.weight cannot be merged",
            "[32, 72] at entry 0 and [33, 72] at entry 3",
        ],
    ),
    "one down_proj": (
        {"model.layers.2.mlp.experts.5.down_proj.weight": (72, 31)},
        ["layers.2.mlp.experts.*.down_proj.weight cannot be merged", "[72, 32] at entry 0 and [72, 31] at entry 5"],
    ),
    "all up_proj": (
        {f"model.layers.1.mlp.experts.{expert}.up_proj.weight": (33, 72) for expert in range(12)},
        ["layers.1.mlp.experts.*.{gate,up}_proj.weight has shape [12, 65, 72], expected [12, 64, 72]"],
    ),
    "one expert too many": (
        {f"model.layers.1.mlp.experts.12.{x}_proj.weight": (32, 72) for x in ("gate", "up")},
        ["layers.1.mlp.experts.12.gate_proj.weight is one too many"],
    ),
}


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=["strict", "ignore_mismatched_sizes"])
@every_class
@pytest.mark.parametrize(("shapes", "parts"), MISSHAPEN.values(), ids=MISSHAPEN.keys())
def test_misshapen_backbone_tensor_is_an_error_that_names_it(shapes, parts, auto_class, options, checkpoint):
    folder = checkpoint(changed={name: torch.zeros(shape) for name, shape in shapes.items()})
    assert_refused_with(parts, folder, auto_class, **options)


def test_all_problems_are_named_at_once(checkpoint):
    folder = checkpoint(
        "layers.0.input_layernorm",
        changed={
            "model.norm.weight": torch.zeros(3),
            "model.layers.2.mlp.experts.0.down_proj.weight": torch.zeros(72, 8),
        },
    )
    with pytest.raises(ValueError, match="backbone") as refusal:
        AutoModelForCausalLM.from_pretrained(folder)
    for name in ("layers.0.input_layernorm.weight", "layers.2.mlp.experts.*.down_proj.weight", "norm.weight"):
        assert f"model.{name} " in str(refusal.value)


@every_class
def test_experts_under_wrong_numbers_are_refused_and_not_shifted(auto_class, checkpoint):
    shapes = {"gate_proj": (32, 72), "up_proj": (32, 72), "down_proj": (72, 32)}
    renamed = {f"model.layers.1.mlp.experts.12.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
    folder = checkpoint("layers.1.mlp.experts.11.", changed=renamed)
    came = ["layers.1.mlp.experts.11.down_proj.weight is missing", "experts.12.down_proj.weight is one too many"]
    assert_refused_with(came, folder, auto_class)


def test_another_width_in_config_json_is_refused(checkpoint):
    with pytest.raises(ValueError, match=r"kv_b_proj.weight has shape \[120, 40\], expected \[120, 48\]"):
        AutoModelForCausalLM.from_pretrained(checkpoint(), kv_lora_rank=48)


@pytest.fixture
def load_report(caplog, monkeypatch):
    """The text of transformers' load report."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    return lambda: caplog.text


def test_missing_head_is_initialized_and_reported(checkpoint, load_report):
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint("lm_head"), output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert model.lm_head.weight.std().item() == pytest.approx(V2["initializer_range"], rel=0.05)
    assert "lm_head.weight" in load_report()
    assert "MISSING" in load_report()


def test_complete_checkpoint_reports_nothing(checkpoint, load_report):
    AutoModelForCausalLM.from_pretrained(checkpoint())
    assert "LOAD REPORT" not in load_report()


def test_head_of_another_size_must_be_allowed(checkpoint):
    folder = checkpoint(changed={"lm_head.weight": torch.zeros(97, 72)})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder)
    _, info = AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert [name for name, _, _ in info["mismatched_keys"]] == ["lm_head.weight"]


@every_class
def test_unexpected_tensors_are_listed(auto_class, checkpoint):
    extra = {
        "model.layers.3.self_attn.o_proj.weight": torch.zeros(72, 72),
        "model.layers.0.self_attn.q_proj.weight": torch.zeros(72, 72),
        "model.layers.1.mlp.gate.e_score_correction_bias": torch.zeros(12),
        "something.else": torch.zeros(3),
    }
    _, info = auto_class.from_pretrained(checkpoint(changed=extra), output_loading_info=True)
    assert info["unexpected_keys"] == extra.keys() | CLASSES[auto_class][1]


def test_rotary_buffers_of_old_checkpoints_are_ignored(checkpoint, load_report):
    old = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.full((4,), 9.0) for layer in range(3)}
    model, info = AutoModelForCausalLM.from_pretrained(checkpoint(changed=old), output_loading_info=True)
    assert not info["unexpected_keys"]
    assert "LOAD REPORT" not in load_report()
    assert model.model.rotary_emb.inv_freq[0] == 1.0


@pytest.mark.parametrize("cut", [0.3, 0.99])
def test_truncated_file_is_an_error(cut, checkpoint):
    folder = checkpoint()
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(cut * len(content))])
    with pytest.raises((SafetensorError, OSError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_missing_shard_is_an_error(checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint()).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(OSError, match=shards[1].name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


# ways to load


def test_dtype_of_the_file_is_kept(tmp_path):
    config = DeepseekV2Config(**V2)
    write_checkpoint(tmp_path, config, official_tensors(config, torch.bfloat16))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_requested_dtype_is_used(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16)
    # except for routers, which are in float32 in the file
    others = [parameter for name, parameter in model.named_parameters() if not name.endswith("mlp.gate.weight")]
    assert {parameter.dtype for parameter in others} == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [{"device_map": "cpu"}, {"device_map": {"": "cpu"}}, {"use_safetensors": True}, {"low_cpu_mem_usage": True}],
    ids=lambda options: f"{options}",
)
def test_every_way_of_loading_gives_the_same_model(options, checkpoint):
    folder = checkpoint()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert torch.equal(logits_of(model), logits_of(plain))


def test_state_dict_in_memory_loads_like_a_file(official, checkpoint):
    model = DeepseekV2ForCausalLM.from_pretrained(None, config=DeepseekV2Config(**V2), state_dict=dict(official))
    assert torch.equal(logits_of(model), logits_of(AutoModelForCausalLM.from_pretrained(checkpoint())))


@pytest.mark.parametrize("rope_type", ["yarn", "default", "linear", "dynamic"])
def test_rotary_frequencies_are_computed_again_at_loading(rope_type, tmp_path):
    scaling = {"yarn": V2["rope_scaling"], "default": None}.get(rope_type, {"type": rope_type, "factor": 2.0})
    model = tiny_model(rope_scaling=scaling)
    model.save_pretrained(tmp_path)
    assert not any("inv_freq" in name for name in files_of(tmp_path))
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    rotary, rotary_again = model.model.rotary_emb, again.model.rotary_emb
    assert torch.equal(rotary.inv_freq, rotary_again.inv_freq)
    assert torch.equal(rotary.original_inv_freq, rotary_again.original_inv_freq)
    assert rotary.attention_scaling == rotary_again.attention_scaling
    assert torch.equal(logits_of(again), logits_of(model))


def test_loading_under_a_meta_default_device_leaves_nothing_on_it(checkpoint):
    folder = checkpoint()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.device("meta"):
        skeleton = DeepseekV2ForCausalLM(AutoConfig.from_pretrained(folder))
    assert {tensor.device.type for tensor in (*skeleton.parameters(), *skeleton.buffers())} == {"meta"}
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert {tensor.device.type for tensor in (*loaded.parameters(), *loaded.buffers())} == {"cpu"}
    assert torch.equal(logits_of(loaded), logits_of(plain))


def test_model_moved_from_meta_is_initialized_with_the_right_frequencies():
    with torch.device("meta"):
        model = DeepseekV2ForCausalLM(DeepseekV2Config(**V2))
    model.to_empty(device="cpu")
    model.init_weights()
    rotary = tiny_model().model.rotary_emb
    assert torch.equal(model.model.rotary_emb.inv_freq, rotary.inv_freq)
    assert torch.equal(model.model.rotary_emb.original_inv_freq, rotary.original_inv_freq)


def test_half_precision_model_keeps_exact_frequencies_after_reload(tmp_path):
    model = tiny_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(again.model.rotary_emb.inv_freq, tiny_model().model.rotary_emb.inv_freq)


# embeddings, and the Hub


def test_tied_embeddings_are_stored_once(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in files_of(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("size", [104, 80])
def test_resized_embeddings_are_saved_and_loaded(size, tied, tmp_path):
    model = tiny_model(tie_word_embeddings=tied)
    old = model.model.embed_tokens.weight.detach().clone()
    model.resize_token_embeddings(size)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert again.config.vocab_size == size
    assert again.lm_head.weight.shape == again.model.embed_tokens.weight.shape == (size, 72)
    kept = min(size, len(old))
    assert torch.equal(again.model.embed_tokens.weight[:kept], old[:kept])
    ids = random_ids(1, 6) % kept
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_hub_is_written_by_transformers_own_methods(tmp_path):
    # ours only adds a check for weights that no file can hold
    assert DeepseekV2ForCausalLM.save_pretrained.__wrapped__ is PreTrainedModel.save_pretrained
    for name in ("push_to_hub", "from_pretrained"):
        assert name not in {
            key for cls in DeepseekV2ForCausalLM.__mro__ if "deepseek" in cls.__module__ for key in vars(cls)
        }
        assert callable(getattr(DeepseekV2ForCausalLM, name))


def test_a_saved_folder_loads_after_it_is_moved(checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint())
    model.save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "moved")
    shutil.rmtree(tmp_path / "checkpoint")
    shutil.rmtree(tmp_path / "saved")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "moved")), logits_of(model))


@pytest.mark.parametrize("strict", [True, False])
def test_load_state_dict_takes_the_names_in_files(strict):
    source, target = tiny_model(), tiny_model(seed=5)
    target.load_state_dict(official_state_dict(source), strict=strict)
    for (name, ours), theirs in zip(target.named_parameters(), source.parameters()):
        assert torch.equal(ours, theirs), name


def test_load_state_dict_takes_one_shard_after_another():
    source, target = tiny_model(), tiny_model(seed=5)
    tensors = list(official_state_dict(source).items())
    for shard in (tensors[:20], tensors[20:50], tensors[50:]):
        target.load_state_dict(dict(shard), strict=False)
    for (name, ours), theirs in zip(target.named_parameters(), source.parameters()):
        assert torch.equal(ours, theirs), name


def routers(model) -> list[torch.Tensor]:
    return [parameter for name, parameter in model.named_parameters() if name.endswith("mlp.gate.weight")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_router_in_float32_keeps_its_dtype_through_loading_and_saving(dtype, tmp_path):
    """transformers 5.24 trains routers in float32; rounded to 16 bits, they would choose other experts."""
    model = tiny_model(dtype)
    for weight in routers(model):
        weight.data = weight.data.float() + 1e-4
    model.save_pretrained(tmp_path / "first")
    DeepseekV2ForCausalLM.from_pretrained(tmp_path / "first", dtype=dtype).save_pretrained(tmp_path / "second")
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path / "second", dtype="auto").eval()
    assert {weight.dtype for weight in routers(again)} == {torch.float32}
    assert {x.dtype for x in again.parameters()} == {torch.float32, dtype}
    assert all(torch.equal(one, other) for one, other in zip(routers(again), routers(model)))
    ids = random_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_router_in_bfloat16_is_computed_and_saved_unchanged(tmp_path):
    model, ids = tiny_model(torch.bfloat16), random_ids(2, 9)
    model.save_pretrained(tmp_path)
    again = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {x.dtype for x in again.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    wide = DeepseekV2ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {x.dtype for x in wide.parameters()} == {torch.float32}


def test_inspect_accepts_a_router_in_float32(tmp_path, capsys):
    model = tiny_model(torch.bfloat16)
    for weight in routers(model):
        weight.data = weight.data.float()
    model.save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0, capsys.readouterr().out
