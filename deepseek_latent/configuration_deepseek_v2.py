"""The configuration of DeepSeek-V2: its fields, how they are read, and how they are written for every client."""

from dataclasses import fields
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config as NativeConfig

from .compat.cache_name import CACHE_NAMES
from .compat.tensor_parallel import SUMS_GRADIENTS
from .compat.transformers import ConfigHooks, carries_its_code
from .configuration.checks import check_fields, check_general_fields, refuse_other_architectures
from .configuration.rope_parameters import DEFAULT_THETA, LEGACY_NAMES, merge_rope, split_rope

# fields of transformers' own class that this one derives; DeepSeek's files have none of them
_DERIVED = ("qk_head_dim", "head_dim", "mlp_bias")


@strict
class DeepseekV2Config(ConfigHooks, PreTrainedConfig):
    r"""Configuration of a DeepSeek-V2 model (MLA attention, DeepSeekMoE feed-forward).

    Field names and defaults are those of DeepSeek's published `configuration_deepseek.py`. `n_routed_experts=None`
    makes every layer dense; `n_shared_experts=None` leaves the shared expert out; `q_lora_rank=None` projects queries
    in one step (V2-Lite). Widths: `kv_lora_rank` is c, `qk_nope_head_dim` n, `qk_rope_head_dim` r, `v_head_dim` v.

    RoPE is given as `rope_parameters` (transformers 5) or as `rope_theta` and `rope_scaling` (older versions). If both
    forms are given, they must agree. Both are written to config.json.

    Raises:
        ValueError: at construction, with the name of the field, what was expected, what it got and what to do.

    Source: DeepSeek-V2 (arXiv:2405.04434) §2 and §3.1.2, and the config.json files of the release.
    """

    model_type = "deepseek_v2"
    # Trainer takes everything else in an output as predictions, which are then the logits alone
    keys_to_ignore_at_inference = [*CACHE_NAMES, "aux_loss", "router_logits"]
    attribute_map = {"num_experts": "n_routed_experts", "router_aux_loss_coef": "aux_loss_alpha"}
    # our modules have the same names, so the plans of the installed transformers apply to them
    # attention sums the gradient of the rotary key itself (compat/tensor_parallel.py)
    base_model_tp_plan = {
        name: style for name, style in NativeConfig.base_model_tp_plan.items() if style != "mla_kv_a_proj"
    } | {"layers.*.self_attn": SUMS_GRADIENTS, "layers.*.mlp": SUMS_GRADIENTS}
    base_model_pp_plan = NativeConfig.base_model_pp_plan
    base_model_ep_plan = NativeConfig.base_model_ep_plan

    vocab_size: int = 102400
    hidden_size: int = 4096
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_parameters: dict | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001

    # MLA
    q_lora_rank: int | None = 1536
    # null in checkpoints without latent attention; it is allowed here so that `check_fields` can explain the refusal
    kv_lora_rank: int | None = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    attention_bias: bool = False
    # the last channels of a latent, which a quantized LatentCache stores in bfloat16: conversions put there what codes
    # of few bits hold badly
    num_unquantized_channels: int = 0
    # how many elements the model that this one was converted from caches per token and layer; only reports use it
    source_cached_width: int | None = None
    attention_dropout: float | int = 0.0

    # feed-forward
    hidden_act: str = "silu"
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    n_routed_experts: int | None = None
    n_shared_experts: int | None = None
    num_experts_per_tok: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1

    # router
    topk_method: str = "greedy"
    scoring_func: str = "softmax"
    n_group: int | None = None
    topk_group: int | None = None
    norm_topk_prob: bool = False
    routed_scaling_factor: float | int = 1.0
    output_router_logits: bool = False

    classifier_dropout: float | int = 0.1

    # factors of the balance losses, which are added to the loss in training with `output_router_logits`
    aux_loss_alpha: float | int = 0.001
    device_aux_loss_alpha: float | int = 0.0
    communication_aux_loss_alpha: float | int = 0.0
    seq_aux: bool = True

    # token dropping in training: the capacity of each of the n_group devices, relative to an even share (None drops no
    # token), and the fraction of sequences from which no token is dropped
    device_capacity_factor: float | int | None = None
    no_drop_fraction: float | int = 0.1

    # kept for DeepSeek's own code and for training tools; this package does not use them
    ep_size: int = 1
    pretraining_tp: int = 1

    def __post_init__(self, **kwargs: Any):
        refuse_other_architectures(kwargs)
        check_general_fields(kwargs | {name: getattr(self, name) for name in ("dtype", "architectures", "id2label")})
        kwargs.pop("model_type", None)
        self.rope_parameters = merge_rope(
            self.rope_parameters, kwargs.pop("rope_theta", None), kwargs.pop("rope_scaling", None)
        )
        # DeepSeek's own class misspells its default, and dense checkpoints written by it carry the misspelling
        if self.topk_method == "gready":
            self.topk_method = "greedy"
        # vLLM and SGLang refuse null; the router is the same with one group of all experts
        self.n_group = 1 if self.n_group is None else self.n_group
        self.topk_group = 1 if self.topk_group is None else self.topk_group
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name in _DERIVED:
            kwargs.pop(name, None)
        for name in kwargs:
            known = getattr(type(self), name, None)
            if callable(known) or (isinstance(known, property) and known.fset is None):
                raise ValueError(f"{name} is a name in the config's class, and no field of config.json; remove it.")
        super().__post_init__(**kwargs)
        # `strict` calls it as well, but wraps its ValueError in another error
        self.validate_architecture()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """As in transformers, but overrides in `kwargs` pass the same checks as values from a file."""
        refuse_other_architectures(config_dict)
        check_general_fields(config_dict)
        if config_dict.get("model_type") == "deepseek" and config_dict.get("kv_lora_rank") is None:
            raise ValueError(
                "model_type 'deepseek' without kv_lora_rank is DeepSeek-MoE 16B, which has no latent attention; "
                "expected a DeepSeek-V2 config.json."
            )
        names = {field.name for field in fields(cls)} | {*cls.attribute_map, *LEGACY_NAMES, *_DERIVED}
        names.remove("dtype")  # transformers itself converts it
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        try:
            return super().from_dict(_without_overridden_rope(config_dict, overrides) | overrides, **kwargs)
        except StrictDataclassError as error:
            # a value of the wrong type, which may be very long
            message = " ".join(str(error).split())
            message = message if len(message) < 500 else f"{message[:500]}..."
            raise ValueError(f"{message} Correct the type of this field.") from error

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """The older name of `rope_parameters`. Setting it keeps rope_theta."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None):
        self.rope_parameters = merge_rope(
            {"rope_theta": self.rope_parameters["rope_theta"]} | (value or {}), None, None
        )

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head, n + r."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def head_dim(self) -> int:
        """r, under the name by which transformers looks up the rotary width."""
        return self.qk_rope_head_dim

    @property
    def mlp_bias(self) -> bool:
        """Always false, since no MLP of DeepSeek-V2 has a bias."""
        return False

    def is_moe_layer(self, layer_idx: int) -> bool:
        """Whether layer `layer_idx` (from 0) has experts rather than a dense MLP."""
        return (
            self.n_routed_experts is not None
            and layer_idx >= self.first_k_dense_replace
            and layer_idx % self.moe_layer_freq == 0
        )

    @property
    def moe_layers(self) -> list[int]:
        """The indices of the layers that have experts."""
        return [i for i in range(self.num_hidden_layers) if self.is_moe_layer(i)]

    @property
    def normalizes_gates(self) -> bool:
        """Whether a token's gate values are normalized to sum to 1; DeepSeek's V2 code then does not scale them."""
        return self.norm_topk_prob and self.num_experts_per_tok > 1

    @property
    def cached_width(self) -> int:
        """The number of elements cached per token and layer, c + r (paper 2.1.3)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def validate_architecture(self):
        """Raises ValueError for fields that this architecture cannot have; transformers also calls it before saving."""
        check_fields(self)

    def to_dict(self) -> dict[str, Any]:
        """As in transformers, with RoPE's settings also in the older form that other clients read."""
        output = super().to_dict()
        rope_theta, output["rope_scaling"] = split_rope(output["rope_parameters"])
        # without this package, transformers' bare PreTrainedConfig fails if a file has rope_theta together with a YaRN
        # rope_scaling (patch_base_config_reader); without rope_theta, every client takes 10000
        if output["rope_scaling"] is None or rope_theta != DEFAULT_THETA:
            output["rope_theta"] = rope_theta
        # these are fields of this package alone, so they are written only if they are used
        own_fields = ("device_aux_loss_alpha", "communication_aux_loss_alpha", "device_capacity_factor")
        for name in (*own_fields, "num_unquantized_channels", "source_cached_width"):
            if not output[name]:
                del output[name]
        if "device_capacity_factor" not in output:
            del output["no_drop_fraction"]
        # auto_map names files that exist only beside the checkpoint from which this config was read
        if not carries_its_code(self):
            output.pop("auto_map", None)
        elif "auto_map" in output:
            # code that was loaded from a subfolder is saved beside the weights
            output["auto_map"] = {auto: _without_folder(ref) for auto, ref in output["auto_map"].items()}
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        output = super().to_diff_dict()
        if "dtype" in output:
            output["torch_dtype"] = output["dtype"]
        return output


class DeepseekFirstUploadConfig(PreTrainedConfig):
    """Reads the config.json of DeepSeek-V2's first upload, which has the `model_type` "deepseek"."""

    model_type = "deepseek"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """Returns a `DeepseekV2Config`, or raises ValueError for DeepSeek-MoE 16B, which has no MLA."""
        return DeepseekV2Config.from_dict(config_dict, **kwargs)


def own_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Returns `config`, or where it is of transformers' own class, a `DeepseekV2Config` with the same fields.

    A config is of that class if it was made before this package was imported.

    Raises ValueError where `DeepseekV2Config` does, such as for fields of another architecture.
    """
    if not isinstance(config, NativeConfig):
        return config
    own = DeepseekV2Config.from_dict(config.to_dict())
    # these are not in the dict
    own.name_or_path = config.name_or_path
    own._attn_implementation, own._experts_implementation = config._attn_implementation, config._experts_implementation
    return own


def _without_folder(reference: str | list) -> str | list:
    return reference.rpartition("/")[2] if isinstance(reference, str) else reference


def _without_overridden_rope(config_dict: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `config_dict` without the RoPE settings that `overrides` replaces."""
    given = dict(config_dict)
    if "rope_parameters" in overrides:
        return {name: value for name, value in given.items() if name not in LEGACY_NAMES}
    if overrides.keys().isdisjoint(LEGACY_NAMES):
        return given
    rope = merge_rope(given.pop("rope_parameters", None), given.get("rope_theta"), given.get("rope_scaling"))
    given["rope_theta"], given["rope_scaling"] = split_rope(rope)
    return given
