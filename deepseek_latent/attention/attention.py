"""Multi-head Latent Attention as a module: its projections, its use of the cache, and the choice of path.

Letters: b batch, s new tokens, t all visible tokens, h heads, d model width, n/r/v content, rotary and value width
per head, c KV latent width, a query latent width, k rank of a LoRA adapter.
"""

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import Cache

from ..cache.latent_cache import LatentCache
from ..cache.paged import PagedLatents, select_tokens
from ..cache.segments import Latents, SplitSegment
from ..compat.accelerate import weights_here
from ..compat.cache_name import takes_either_cache_name
from ..compat.peft import acts_on_some_tokens
from ..compat.tensor_parallel import SharedModule
from ..compat.transformers import attention_name
from ..configuration_deepseek_v2 import DeepseekV2Config
from .masks import dense_mask, flex_cannot_read, held_tokens_mask
from .ops import UpProjection, absorbed_attention, absorbing_is_cheaper, expanded_attention
from .read_linear import read_linear
from .rotary import rotate, softmax_scale
from .sdpa import ATTENTION_FUNCTIONS, explicit_attention_forward


class DeepseekV2Attention(SharedModule):
    """Caches one latent and one rotary key per token and attends to them in that form.

    Three paths give the same result. If the weight of `kv_b_proj` can be read exactly (`up_projections`), few new
    tokens take `absorbed_attention` and many take `expanded_attention`. Otherwise, and in training, `kv_b_proj` is
    called as a module, and the attention function that the user selected attends to keys and values.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.1, eqs. 9-19 and 37-47.
    """

    rotate = staticmethod(rotate)

    def __init__(self, config: DeepseekV2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.num_key_value_groups = 1  # read by transformers' attention functions: each head has its own expanded key
        self.scaling = softmax_scale(config)

        self.qk_nope_head_dim, self.qk_rope_head_dim = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.qk_head_dim, self.v_head_dim = config.qk_head_dim, config.v_head_dim
        self.q_lora_rank, self.kv_lora_rank = config.q_lora_rank, config.kv_lora_rank
        d, h, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        if self.q_lora_rank is None:
            self.q_proj = nn.Linear(d, h * self.qk_head_dim, bias=False)
        else:
            self.q_a_proj = nn.Linear(d, self.q_lora_rank, bias=bias)
            # as in the release, the norms of latents have eps 1e-6, whatever rms_norm_eps is
            self.q_a_layernorm = nn.RMSNorm(self.q_lora_rank, eps=1e-6)
            self.q_b_proj = nn.Linear(self.q_lora_rank, h * self.qk_head_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(d, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = nn.RMSNorm(self.kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(self.kv_lora_rank, h * (self.qk_nope_head_dim + self.v_head_dim), bias=False)
        self.o_proj = nn.Linear(h * self.v_head_dim, d, bias=bias)

    @takes_either_cache_name
    def forward(
        self,
        hidden_states: Tensor,  # [b s d]
        attention_mask: Tensor | BlockMask | None = None,
        cache: Cache | PagedLatents | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,  # cos, sin [b s r/2]
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:  # [b s d], weights [b h s t] if they are wanted
        q_content, q_rotary, latent, k_rotary = self.project(hidden_states, position_embeddings)
        if isinstance(cache, PagedLatents):
            context, weights = self.attend_to_pages(q_content, q_rotary, latent, k_rotary, cache), None
        else:
            latents = self.append(latent, k_rotary, cache, attention_mask)
            context, weights = self.attend(q_content, q_rotary, latents, attention_mask, **kwargs)
        return self.o_proj(context.flatten(2)), weights

    def append(
        self,
        latent: Tensor,  # [b 1 s c]
        k_rotary: Tensor,  # [b 1 s r]
        cache: Cache | None,
        attention_mask: Tensor | BlockMask | None,
    ) -> Latents:
        """Adds new tokens to the cache, if there is one, and returns all tokens to attend to."""
        if isinstance(cache, LatentCache):
            return cache.append(latent, k_rotary, self.layer_idx)
        num_tokens = latent.shape[2]
        if cache is not None:
            # the cache holds latents and rotary keys, in place of keys and values
            latent, k_rotary = cache.update(latent, k_rotary, self.layer_idx)
        if attention_mask is None and 1 < num_tokens < latent.shape[2] and attention_name(self.config) == "sdpa":
            # the first prompt in a StaticCache has no mask, so the part that is not written yet is dropped here
            latent, k_rotary = (x[:, :, :num_tokens] for x in (latent, k_rotary))
        return Latents(SplitSegment(latent[:, 0], k_rotary[:, 0]))

    @torch.compiler.disable  # the number and sizes of groups are known only at run time
    def attend_to_pages(
        self,
        q_content: Tensor,  # [1 s h n]  all requests, packed
        q_rotary: Tensor,  # [1 s h r]
        latent: Tensor,  # [1 1 s c]
        k_rotary: Tensor,  # [1 1 s r]
        pages: PagedLatents,
    ) -> Tensor:  # [1 s h v]
        """Adds new tokens to the pages and attends to one group of requests after another; padding tokens get zeros."""
        context = None
        for queries, latents, mask in pages.append(latent, k_rotary, self.layer_idx):
            query_pair = (select_tokens(x[0], queries) for x in (q_content, q_rotary))
            part, _ = self.attend(*query_pair, latents, mask, output_attentions=False)
            if context is None:
                context = part.new_zeros(q_content.shape[1], *part.shape[2:])
            context[queries] = part
        return context[None]

    def attend(
        self,
        q_content: Tensor,  # [b s h n]
        q_rotary: Tensor,  # [b s h r]
        latents: Latents,  # t tokens
        attention_mask: Tensor | BlockMask | None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:  # [b s h v], weights [b h s t] if they are wanted
        """Computes the context of every head by the cheapest path that is exact here (see the class)."""
        num_tokens = q_content.shape[1]
        if latents.num_held is not None and (attention_mask is None or len(attention_mask.shape) == 2):
            attention_mask = held_tokens_mask(attention_mask, num_tokens, latents)

        wants_weights = kwargs.pop("output_attentions", self.config.output_attentions)
        dropout = self.attention_dropout if self.training else 0.0
        # gradients and dropout need the modules' own forward; a trace must not depend on whether gradients are on
        may_read_weights = not (wants_weights or dropout or torch.is_grad_enabled() or torch.jit.is_tracing())
        path = self.choose_path(num_tokens, latents.num_tokens, attention_mask) if may_read_weights else None
        if path is not None:
            with weights_here(self.kv_b_proj):
                up_projections = self.up_projections()
                if up_projections is not None:
                    mask = dense_mask(attention_mask, num_tokens, latents.num_tokens)
                    return path(q_content, q_rotary, latents, *up_projections, mask=mask, scale=self.scaling), None

        latent, k_rotary = (x[:, None] for x in latents.dense(q_content.shape[0]))
        if acts_on_some_tokens(self.kv_b_proj):
            if num_tokens < latents.num_tokens:
                raise ValueError(
                    "an activated LoRA (aLoRA) on kv_b_proj cannot act on cached latents, which do not show which "
                    "tokens follow its invocation; leave kv_b_proj out of its target_modules."
                )
            # peft takes a view of `latent`, which needs contiguous memory
            latent = latent.contiguous()
        keys, values = self.expand_kv(latent, k_rotary)
        queries = torch.cat((q_content, q_rotary), dim=-1).transpose(1, 2)
        return self.attention_function(wants_weights, attention_mask)(
            self,
            queries,
            keys,
            values,
            attention_mask,
            dropout=dropout,
            scaling=self.scaling,
            **kwargs,
        )

    def project(self, hidden_states: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Maps [b s d] to q_content [b s h n], q_rotary [b s h r], latent [b 1 s c] and k_rotary [b 1 s r].

        Both rotary parts are rotated.
        """
        q_content, q_rotary = self.project_queries(hidden_states)
        latent, k_rotary = self.project_latents(hidden_states)
        k_rotary = self.used_by_all(k_rotary)
        # the key is rotated as one more head, which saves a GPU half of the launches
        rotated = self.rotate(torch.cat((q_rotary, k_rotary[:, :, None]), dim=2), *rotation)
        return q_content, rotated[:, :, :-1], latent[:, None], rotated[:, None, :, -1]

    def project_queries(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [b s d] to q_content [b s h n] and q_rotary [b s h r], not rotated yet (eqs. 12-14)."""
        project = self.q_proj if self.q_lora_rank is None else self.q_b_proj
        queries = project(self.query_input(hidden_states))
        # -1, since a tensor-parallel rank has only some of the heads
        queries = queries.view(*hidden_states.shape[:2], -1, self.qk_head_dim)
        return queries.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)

    def query_input(self, hidden_states: Tensor) -> Tensor:
        """Returns the input of the last projection of queries: [b s d] itself, or the query latent [b s a] (eq. 12)."""
        return hidden_states if self.q_lora_rank is None else self.q_a_layernorm(self.q_a_proj(hidden_states))

    def project_latents(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Maps [b s d] to latents [b s c] after their norm, and keys [b s r], not rotated yet (eqs. 9, 15)."""
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        latent, k_rotary = compressed.split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        return self.kv_a_layernorm(latent), k_rotary

    def expand_kv(self, latent: Tensor, k_rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Expands [b 1 t c] and [b 1 t r] to keys [b h t n+r] and values [b h t v] by `kv_b_proj` (eqs. 10-11, 17)."""
        widths = (self.qk_nope_head_dim, self.v_head_dim)
        expanded = torch.unflatten(self.kv_b_proj(latent[:, 0]), -1, (-1, sum(widths))).transpose(1, 2)
        k_content, values = expanded.split(widths, dim=-1)
        return torch.cat((k_content, k_rotary.expand(-1, k_content.shape[1], -1, -1)), dim=-1), values

    def up_projections(self) -> tuple[UpProjection, UpProjection] | None:
        """Reads W^UK [h n c] and W^UV [h v c] from `kv_b_proj`, with adapters; None if it can only be called."""
        read = read_linear(self.kv_b_proj)
        if read is None:
            return None
        weight, factors = read
        w_uk, w_uv = self._split_by_head(weight)
        per_head = [(self._split_by_head(b), a) for b, a in factors]
        return (
            UpProjection(w_uk, tuple((b_uk, a) for (b_uk, _), a in per_head)),
            UpProjection(w_uv, tuple((b_uv, a) for (_, b_uv), a in per_head)),
        )

    def _split_by_head(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Splits [h(n+v) k] into [h n k] and [h v k]."""
        widths = (self.qk_nope_head_dim, self.v_head_dim)
        return torch.unflatten(weight, 0, (-1, sum(widths))).split(widths, dim=1)

    def choose_path(self, s: int, t: int, mask: Tensor | BlockMask | None):
        """Chooses `absorbed_attention`, `expanded_attention`, or None for the attention function the user selected.

        `attn_implementation` selects how expanded attention is computed, so our own is used for "sdpa" only. Absorbed
        attention is used with every implementation whose mask `dense_mask` can convert.
        """
        # flash attention's masks do not order several queries, and the masks of unknown functions cannot be read
        readable = s == 1 or attention_name(self.config) in ("sdpa", "eager", "flex_attention")
        # a static cache has more rows than its padding mask covers
        if isinstance(mask, Tensor) and mask.shape[-1] != t:
            readable = False
        if readable and absorbing_is_cheaper(s, t, c=self.kv_lora_rank, n=self.qk_nope_head_dim, v=self.v_head_dim):
            return absorbed_attention
        return expanded_attention if attention_name(self.config) == "sdpa" else None

    def attention_function(self, wants_weights: bool, mask: Tensor | BlockMask | None):
        name = attention_name(self.config)
        if wants_weights or (name == "flex_attention" and flex_cannot_read(mask)):
            return explicit_attention_forward
        return ATTENTION_FUNCTIONS.get_interface(name, explicit_attention_forward)
