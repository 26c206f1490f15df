"""What many tests share: small models whose widths all differ, and tolerances taken from data."""

import shutil
import tempfile

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import Tensor
from transformers.integrations import peft as peft_of_transformers
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as NATIVE

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM

YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

# all widths differ, so that a swapped axis fails, and are multiples of 8, so that grouped_mm runs in bfloat16
V2 = {
    "vocab_size": 96,
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "q_lora_rank": 56,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "intermediate_size": 88,
    "moe_intermediate_size": 32,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 16.0,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rope_scaling": YARN,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.1,
}
LITE = V2 | {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}


# the peft that transformers requires for `model.add_adapter`, which may not be released yet
_wanted_peft = getattr(peft_of_transformers, "MIN_PEFT_VERSION", "0")
adds_adapters = Version(peft.__version__) >= Version(_wanted_peft)
needs_its_peft = pytest.mark.skipif(not adds_adapters, reason=f"this transformers wants peft {_wanted_peft}")
needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="there is no C++ compiler on the PATH"
)


def tiny_model(dtype: torch.dtype = torch.float32, seed: int = 0, **overrides) -> DeepseekV2ForCausalLM:
    """Makes a small V2 with lopsided random weights, in eval mode."""
    torch.manual_seed(seed)
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**(V2 | overrides)))
    with torch.no_grad():
        for parameter in model.parameters():
            # rows differ in size, so a transposed or shifted axis changes the result
            slope = torch.linspace(0.5, 1.5, parameter.shape[0])
            parameter.mul_(slope.view(-1, *[1] * (parameter.dim() - 1)))
    return model.to(dtype).eval()


def seeded(seed: int) -> torch.Generator:
    """A generator on the device that the suite runs on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def random_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Token ids [b s], none of them special."""
    return torch.randint(2, V2["vocab_size"], (batch, length), generator=seeded(seed))


def official_state_dict(model: transformers.PreTrainedModel) -> dict[str, Tensor]:
    """The tensors `save_pretrained` writes, by their names in the file."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def native_twin(model: DeepseekV2ForCausalLM) -> NATIVE.DeepseekV2ForCausalLM:
    """transformers' own class with the same weights."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return NATIVE.DeepseekV2ForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()


def assert_within_rounding(actual: Tensor, exact: Tensor, yardstick: Tensor, slack: float = 2.0) -> None:
    """Fails if `actual` is further from `exact` than a plain run in that precision.

    actual     the result of our code, in any dtype
    exact      the same quantity in float64
    yardstick  a plain run in the dtype of `actual`; its error is that of the dtype
    """
    assert torch.isfinite(actual).all(), "non-finite values"
    one_ulp = torch.finfo(actual.dtype).eps * exact.abs().max()
    allowed = slack * ((yardstick.double() - exact).abs().max() + one_ulp)
    error = (actual.double() - exact).abs().max()
    assert error <= allowed, f"error {error:.2e} exceeds {allowed:.2e} (budget from {actual.dtype})"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()
