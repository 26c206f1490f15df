"""DeepSeek-V2: the decoder layer, the model, and its heads."""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache
from transformers.loss.loss_utils import ForCausalLMLoss
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
from .attention.masks import checked_mask
from .attention.rotary import DeepseekV2RotaryEmbedding
from .cache.checks import check_cache, check_labels, check_new_tokens, check_positions, look_up_ids
from .cache.latent_cache import LatentCache
from .cache.paged import PagedLatents, check_unpaged
from .cache.steps import all_or_nothing, begin_step
from .checkpoints import CheckpointMixin
from .compat.cache_name import (
    CACHE,
    CACHE_NAMES,
    MoeCausalLMOutputWithPast,
    MoeModelOutputWithPast,
    takes_either_cache_name,
)
from .compat.other_classes import check_is_own_class
from .compat.pages import PagedAttentionCache
from .configuration_deepseek_v2 import DeepseekV2Config, own_config
from .experts.balance import balance_losses_of_layers, fraction_of_batch
from .experts.dropping import TokenDropping, token_dropping
from .experts.moe import DeepseekV2MLP, DeepseekV2MoE
from .experts.names import register_expert_files
from .experts.router import DeepseekV2MoEGate
from .generation import LatentGenerationMixin


class DeepseekV2DecoderLayer(GradientCheckpointingLayer):
    """Latent attention, then experts or a dense MLP, each after a norm and with a residual connection."""

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
        mlp_options = {} if dropping is None or not self.has_experts else {"dropping": dropping}
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), **mlp_options)


class DeepseekV2PreTrainedModel(CheckpointMixin, PreTrainedModel):
    """The base class of all DeepSeek-V2 models: how weights are handled, and which features of transformers work."""

    config: DeepseekV2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
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
        config = own_config(config)
        # the config may have been changed since it was checked at construction
        config.validate_architecture()
        super().__init__(config)

    # with hooks; `forward` of a head is called without it by peft
    __call__ = all_or_nothing(PreTrainedModel.__call__)


class DeepseekV2Model(DeepseekV2PreTrainedModel):
    """DeepSeek-V2 without a head: token ids [b s] to hidden states [b s d]."""

    def __init__(self, config: DeepseekV2Config):
        config = own_config(config)
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
        check_new_tokens(input_ids, inputs_embeds, self.config.hidden_size)
        # continuous batching packs all requests into one row and passes their positions
        pages = cache if isinstance(cache, PagedAttentionCache) else None
        cache = given = None if pages is not None else cache
        if use_cache and cache is None and pages is None:
            cache = LatentCache(self.config)
        if inputs_embeds is None:
            inputs_embeds = look_up_ids(self.embed_tokens, input_ids, self.config.vocab_size)
        # pipeline parallelism replaces the layers of other stages by placeholders
        is_here = [isinstance(layer, DeepseekV2DecoderLayer) for layer in self.layers]
        is_latent_cache = isinstance(cache, LatentCache)
        if is_latent_cache:
            cache.update_count(inputs_embeds.device)
        num_held = check_cache(cache, self.config, inputs_embeds, is_here)
        cached = cache.get_seq_length() if cache is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + cached)[None]
        else:
            check_positions(position_ids, *inputs_embeds.shape[:2])
        # generating in training mode is not training
        is_training = self.training and torch.is_grad_enabled()
        dropping = token_dropping(self.config, attention_mask, inputs_embeds, self.layers) if is_training else None
        if pages is not None:
            layers_cache = PagedLatents(pages, self.config.cached_width, kwargs)
        else:
            layers_cache = cache
            check_unpaged(self.config)
            if attention_mask is not None:
                attention_mask = checked_mask(attention_mask, inputs_embeds, self.config, given, num_held)
            # in a recorded step over a static cache, attention makes its own mask, from the number of tokens held
            if attention_mask is not None or not is_latent_cache or not cache.is_recorded:
                attention_mask = create_causal_mask(
                    config=self.config,
                    inputs_embeds=inputs_embeds,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    # transformers looks for packed sequences in position_ids only if it gets no cache
                    **{CACHE: None if is_latent_cache and isinstance(cached, int) and cached == 0 else cache},
                )
        if is_latent_cache:
            cache.advance(inputs_embeds.shape[1])
        if cache is not None:
            begin_step(cache, is_here, num_held)
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids)
        hidden_states = inputs_embeds
        # a slice of a ModuleList would be made anew for every token
        for layer in [*self.layers][: self.config.num_hidden_layers]:
            hidden_states = layer(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                dropping=dropping,
                # gradient checkpointing removes the cache, which it finds by this name
                **{CACHE: layers_cache},
                **kwargs,
            )
        hidden_states = self.norm(hidden_states)
        if is_latent_cache:
            cache.end_step()
        return MoeModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})


class DeepseekV2ForCausalLM(LatentGenerationMixin, DeepseekV2PreTrainedModel):
    """DeepSeek-V2 with its language-model head: token ids [b s] to logits [b s vocab] in the model's dtype."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: DeepseekV2Config):
        config = own_config(config)
        super().__init__(config)
        self.model = DeepseekV2Model(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @all_or_nothing
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
        """Returns logits, and with `labels` [b s] (-100 is ignored) the mean cross-entropy of next tokens, in float32.

        `logits_to_keep` is a number of last tokens (0 keeps all) or an index tensor over the s axis.

        With `output_router_logits`, `aux_loss` is the sum of all layers' expert-level balance losses. In training, the
        balance losses are added to `loss`, weighted by their factors in the config, unless every router is frozen.
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
            # another loss function may take other labels
            if self.loss_function is ForCausalLMLoss:
                check_labels(labels, logits)
            options = {"logits": logits, "vocab_size": self.config.vocab_size, **kwargs}
            loss = look_up_ids(
                lambda ids: self.loss_function(labels=ids, **options), labels, self.config.vocab_size, ignored=-100
            )
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
    """DeepSeek-V2 with one label per sequence, computed at its last token that is not padding."""

    forward = all_or_nothing(takes_either_cache_name(GenericForSequenceClassification.forward))

    def __init__(self, config: DeepseekV2Config):
        config = own_config(config)
        # the generic __init__ asks AutoModel for the backbone: in a checkpoint's own code, it would get transformers'
        DeepseekV2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekV2Model(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()


class DeepseekV2ForTokenClassification(GenericForTokenClassification, DeepseekV2PreTrainedModel):
    """DeepSeek-V2 with one label per token."""

    forward = all_or_nothing(takes_either_cache_name(GenericForTokenClassification.forward))

    def __init__(self, config: DeepseekV2Config):
        config = own_config(config)
        DeepseekV2PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = DeepseekV2Model(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()


def moe_layers(model: nn.Module) -> dict[int, DeepseekV2MoE]:
    """The MoE block of every layer that has one, by layer index; `model` is a DeepSeek-V2 or contains one.

    Raises ValueError if no layer has experts, and TypeError for a DeepSeek-V2 of another class than this package's.
    """
    backbone = next((module for module in model.modules() if isinstance(module, DeepseekV2Model)), None)
    layers = [] if backbone is None else enumerate(backbone.layers)
    # no isinstance on mlp, since peft may have wrapped it; placeholders of a pipeline have no `has_experts`
    found = {i: layer.mlp for i, layer in layers if getattr(layer, "has_experts", False)}
    if not found:
        check_is_own_class(model)
        raise ValueError("expected a model with experts, and no layer of this one has any.")
    return found


for _model_class in (
    DeepseekV2Model,
    DeepseekV2ForCausalLM,
    DeepseekV2ForSequenceClassification,
    DeepseekV2ForTokenClassification,
):
    register_expert_files(_model_class)
