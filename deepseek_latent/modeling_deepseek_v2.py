"""The spine of DeepSeek-V2: decoder layer, model, heads, and what transformers must know to load, save and generate."""

import functools

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .attention.attention import DeepseekV2Attention
from .attention.rotary import DeepseekV2RotaryEmbedding
from .cache.checks import check_cache, check_padding_mask
from .cache.latent_cache import LatentCache
from .cache.paged import PagedLatents, check_unpaged
from .compat.accelerate import placed_where_computed
from .compat.cache_name import (
    CACHE,
    CACHE_NAMES,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    takes_either_cache_name,
)
from .compat.transformers import LoadingHooks, PagedAttentionCache
from .configuration_deepseek_v2 import DeepseekV2Config
from .experts.balance import balance_losses_of_layers, fraction_of_batch
from .experts.dropping import TokenDropping, token_dropping
from .experts.moe import DeepseekV2MLP, DeepseekV2MoE
from .experts.names import incomplete_backbone, missing_in_files, pattern_in_files, register_expert_files
from .experts.routed import DeepseekV2Experts
from .experts.router import DeepseekV2MoEGate
from .generation import LatentGenerationMixin


class DeepseekV2DecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: DeepseekV2Config, layer_idx: int):
        super().__init__()
        self.self_attn = DeepseekV2Attention(config, layer_idx)
        self.has_experts = config.is_moe_layer(layer_idx)
        self.mlp = DeepseekV2MoE(config) if self.has_experts else DeepseekV2MLP(config, config.intermediate_size)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @takes_either_cache_name
    def forward(
        self,
        hidden_states: Tensor,  # [b s d]
        attention_mask: Tensor | BlockMask | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | PagedLatents | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        dropping: TokenDropping | None = None,
        **kwargs,
    ) -> Tensor:  # [b s d]
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        routed = {} if dropping is None or not self.has_experts else {"dropping": dropping}
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), **routed)


class DeepseekV2PreTrainedModel(LoadingHooks, PreTrainedModel):
    config: DeepseekV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    # transformers 5.24 trains and saves routers in float32, the release has bfloat16; both are computed in float32
    dtype_of_files = ("gate.weight",)
    _no_split_modules = ["DeepseekV2DecoderLayer"]
    _skip_keys_device_placement = [*CACHE_NAMES]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {
        "hidden_states": DeepseekV2DecoderLayer,
        "attentions": DeepseekV2Attention,
        "router_logits": OutputRecorder(DeepseekV2MoEGate, index=0),
    }

    def __init__(self, config: DeepseekV2Config):
        # a config may have been changed since it was made
        config.validate_architecture()
        super().__init__(config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, DeepseekV2RotaryEmbedding):
            # not in the checkpoint, so whatever loads the model has to compute them again
            buffers, _ = module.initial_buffers()
            for name, buffer in buffers.items():
                init.copy_(module.get_buffer(name), buffer)
            return
        super()._init_weights(module)
        if isinstance(module, (DeepseekV2Experts, DeepseekV2MoEGate)):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, mean=0.0, std=self.config.initializer_range)

    @functools.wraps(PreTrainedModel.save_pretrained)
    def save_pretrained(self, *args, **kwargs):
        # with adapters of transformers' own, these alone are written
        if not self.has_adapters_of_transformers():
            for module in self.modules():
                if isinstance(module, DeepseekV2Experts) and module.weights.why_no_saving is not None:
                    raise ValueError(module.weights.why_no_saving)
        super().save_pretrained(*args, **kwargs)

    @functools.wraps(PreTrainedModel.load_adapter)
    def load_adapter(self, *args, **kwargs):
        # an adapter stays where its layer is computed
        with placed_where_computed(self):
            return super().load_adapter(*args, **kwargs)

    def check_loaded(self, missing: list[str], misshapen: list[tuple], errors: dict[str, str]) -> None:
        """Refuses a checkpoint without all of the backbone; transformers would initialise the rest at random."""
        prefix = f"{self.base_model_prefix}." if hasattr(self, self.base_model_prefix) else ""
        problems = [missing_in_files(name, errors.get(name)) for name in missing if name.startswith(prefix)]
        problems += [
            f"{pattern_in_files(name)} has shape {list(came)}, expected {list(own)}"
            for name, came, own in misshapen
            if name.startswith(prefix)
        ]
        if problems:
            raise incomplete_backbone(problems)


class DeepseekV2Model(DeepseekV2PreTrainedModel):
    """DeepSeek-V2 without a head: token ids [b s] to hidden states [b s d]."""

    def __init__(self, config: DeepseekV2Config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(DeepseekV2DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = DeepseekV2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    @takes_either_cache_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> MoeModelOutputWithPast:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds.")
        # continuous batching packs requests into one row and gives their positions
        pages = cache if isinstance(cache, PagedAttentionCache) else None
        cache = None if pages is not None else cache
        if use_cache and cache is None and pages is None:
            cache = LatentCache(self.config)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        # a pipeline leaves stand-ins for the layers of other stages
        is_here = [isinstance(layer, DeepseekV2DecoderLayer) for layer in self.layers]
        is_ours = isinstance(cache, LatentCache)
        if is_ours:
            cache.begin_step(inputs_embeds.device)
        check_cache(cache, self.config, inputs_embeds, is_here)
        cached = cache.get_seq_length() if cache is not None else 0
        check_padding_mask(attention_mask, inputs_embeds, cached)
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + cached)[None]
        # generation in training mode is no training
        is_training = self.training and torch.is_grad_enabled()
        dropping = token_dropping(self.config, attention_mask, inputs_embeds) if is_training else None
        if pages is not None:
            past = PagedLatents(pages, self.config.cached_width, kwargs)
        else:
            past = cache
            check_unpaged(self.config)
            # over a whole buffer, attention goes by the number of tokens held
            if attention_mask is not None or not is_ours or not cache.is_recorded:
                attention_mask = create_causal_mask(
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    # transformers looks for packed sequences in position_ids only where nothing is cached
                    **{CACHE: None if is_ours and isinstance(cached, int) and cached == 0 else cache},
                )
        if is_ours:
            cache.advance(inputs_embeds.shape[1])
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                dropping=dropping,
                # by this name, transformers takes it away where activations are recomputed
                **{CACHE: past},
                **kwargs,
            )
        return MoeModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})


class DeepseekV2ForCausalLM(LatentGenerationMixin, DeepseekV2PreTrainedModel):
    """DeepSeek-V2 with its language-model head: token ids [b s] to logits [b s vocab] in the model's dtype."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeepseekV2Config):
        super().__init__(config)
        self.model = DeepseekV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    @takes_either_cache_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | PagedAttentionCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> MoeCausalLMOutputWithPast:
        """`labels` [b s] (-100 ignored) gives the mean cross-entropy of the next token, in float32.

        `logits_to_keep` is a count from the end (0: all) or an index tensor over the s axis.

        With `output_router_logits`, `aux_loss` is the expert-level balance loss of all layers together, and in training
        the balance losses are part of `loss` with their factors of the config, unless the router is frozen.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        aux_loss = None
        if outputs.router_logits:
            gates = [moe.gate for moe in moe_layers(self).values()]
            shape = outputs.last_hidden_state.shape[:2]
            losses = balance_losses_of_layers(self.config, gates, outputs.router_logits, shape, attention_mask)
            aux_loss = losses.expert
            if loss is not None and self.training and any(gate.weight.requires_grad for gate in gates):
                fraction = fraction_of_batch(labels, kwargs.get("num_items_in_batch"))
                loss = loss + fraction * losses.weighted_sum(self.config)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
            **{CACHE: outputs.cache},
        )


class DeepseekV2ForSequenceClassification(GenericForSequenceClassification, DeepseekV2PreTrainedModel):
    """DeepSeek-V2 with one label per sequence, read at its last token that is not padding."""

    forward = takes_either_cache_name(GenericForSequenceClassification.forward)

    def __init__(self, config: DeepseekV2Config):
        # not the generic __init__: from a checkpoint's own code, AutoModel would put transformers' backbone here
        DeepseekV2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekV2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class DeepseekV2ForTokenClassification(GenericForTokenClassification, DeepseekV2PreTrainedModel):
    """DeepSeek-V2 with one label per token."""

    forward = takes_either_cache_name(GenericForTokenClassification.forward)

    def __init__(self, config: DeepseekV2Config):
        DeepseekV2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekV2Model(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def moe_layers(model: nn.Module) -> dict[int, DeepseekV2MoE]:
    """Layers with experts of a DeepSeek-V2, or of one inside `model`, by number; ValueError where none has any."""
    backbone = next((module for module in model.modules() if isinstance(module, DeepseekV2Model)), None)
    layers = [] if backbone is None else enumerate(backbone.layers)
    # not by its class: peft may have wrapped it, and a pipeline leaves stand-ins for layers
    found = {i: layer.mlp for i, layer in layers if getattr(layer, "has_experts", False)}
    if not found:
        raise ValueError("expected a model with experts, and no layer of this one has any.")
    return found


for _model_class in (
    DeepseekV2Model,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
):
    register_expert_files(_model_class)
