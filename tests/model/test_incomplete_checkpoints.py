"""A backbone that is not complete in the files is refused by name, and never initialized at random."""

import inspect
import logging
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, pipeline
from transformers.core_model_loading import ConversionOps
from transformers.pipelines.base import load_model
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from deepseek_latent import DeepseekV2ForCausalLM
from deepseek_latent.experts.names import register_expert_files
from tests.model.official_checkpoints import CLASSES, every_class
from tests.support import V2

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
            "layers.1.mlp.experts.*.{gate,up}_proj.weight cannot be stacked",
            "[32, 72] at entry 0 and [33, 72] at entry 3",
        ],
    ),
    "one down_proj": (
        {"model.layers.2.mlp.experts.5.down_proj.weight": (72, 31)},
        ["layers.2.mlp.experts.*.down_proj.weight cannot be stacked", "[72, 32] at entry 0 and [72, 31] at entry 5"],
    ),
    "all up_proj": (
        {f"model.layers.1.mlp.experts.{expert}.up_proj.weight": (33, 72) for expert in range(12)},
        ["layers.1.mlp.experts.*.{gate,up}_proj.weight has shape [12, 65, 72], expected [12, 64, 72]"],
    ),
    "one expert too many": (
        {f"model.layers.1.mlp.experts.12.{x}_proj.weight": (32, 72) for x in ("gate", "up")},
        ["layers.1.mlp.experts.12.gate_proj.weight is unexpected"],
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
    came = ["layers.1.mlp.experts.11.down_proj.weight is missing", "experts.12.down_proj.weight is unexpected"]
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


def test_missing_head_of_a_language_model_is_an_error_that_names_it(checkpoint):
    with pytest.raises(ValueError, match=r"language model's head: lm_head\.weight is missing\. Complete"):
        AutoModelForCausalLM.from_pretrained(checkpoint("lm_head"))


def test_missing_head_for_classification_is_initialized_and_reported(checkpoint, load_report):
    folder = checkpoint()
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=64, output_loading_info=True)
    assert info["missing_keys"] == {"score.weight"}
    assert model.score.weight.std().item() == pytest.approx(V2["initializer_range"], rel=0.05)
    assert "score.weight" in load_report()
    assert "MISSING" in load_report()


def test_missing_head_is_the_embedding_where_the_config_ties_them(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("lm_head"), tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_with_further_heads_of_its_own_loads_any_language_model(checkpoint):
    class WithValue(DeepseekV2ForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.value = torch.nn.Linear(config.hidden_size, 1)
            self.post_init()

    register_expert_files(WithValue)
    _, info = WithValue.from_pretrained(checkpoint(), output_loading_info=True)
    assert info["missing_keys"] == {"value.weight", "value.bias"}


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


@pytest.mark.parametrize("task", ["text-generation", "text-classification", "feature-extraction"])
def test_a_pipeline_fails_with_the_refusal_alone(task, checkpoint):
    """pipeline() would go on to other classes after a ValueError, and report the tracebacks of all of them."""
    folder = checkpoint("layers.1.self_attn.o_proj")
    with pytest.raises((LookupError, ValueError), match=r"does not hold this model's backbone: \S*o_proj") as refusal:
        pipeline(task, model=str(folder))
    # some versions of transformers call our class with an argument that no class takes, and list all errors
    if "code_revision" in inspect.getsource(load_model):
        assert str(refusal.value).startswith("the checkpoint does not hold")


@pytest.fixture
def quantizer(monkeypatch):
    """Registers a quantizer "broken" for `up_proj`, whose operation of this name raises an error."""

    def register(name: str, error: Exception) -> QuantizationConfigMixin:
        def convert(self, input_dict, **kwargs):
            raise error

        operation = type(name, (ConversionOps,), {"convert": convert})
        for mapping in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
            monkeypatch.setattr(auto, mapping, {**getattr(auto, mapping)})

        @register_quantization_config("broken")
        class BrokenConfig(QuantizationConfigMixin):
            def __init__(self, **kwargs):
                super().__init__(quant_method="broken")

        @register_quantizer("broken")
        class Broken(HfQuantizer):
            is_trainable = is_serializable = requires_calibration = False

            def param_needs_quantization(self, model, param_name, **kwargs):
                return param_name.endswith("mlp.up_proj.weight")

            def get_quantize_ops(self):
                return operation()

        return BrokenConfig()

    return register


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("SomeQuantize", RuntimeError("needs a GPU")),
        ("SomeDequantize", ImportError("Requires mslk >= 1.0.0")),
        ("SomeDequantize", ModuleNotFoundError("No module named 'mslk'")),
    ],
    ids=["failed", "dependency", "module"],
)
def test_what_a_quantizer_lacks_is_not_blamed_on_the_checkpoint(name, error, checkpoint, quantizer):
    with pytest.raises(ValueError, match="the quantizer could not convert") as refusal:
        AutoModelForCausalLM.from_pretrained(checkpoint(), quantization_config=quantizer(name, error))
    assert f"model.layers.0.mlp.up_proj.weight: {error}. The checkpoint holds these weights" in str(refusal.value)
    assert "Complete or convert the checkpoint" not in str(refusal.value)


def test_weights_that_cannot_be_dequantized_are_the_checkpoints(checkpoint, quantizer):
    broken = quantizer("SomeDequantize", ValueError("scales of another shape"))
    with pytest.raises(ValueError, match=r"up_proj\.weight cannot be converted \(scales of another shape\).*Complete"):
        AutoModelForCausalLM.from_pretrained(checkpoint(), quantization_config=broken)
