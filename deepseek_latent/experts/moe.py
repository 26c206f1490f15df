"""DeepSeekMoE: a router, many narrow routed experts of which each token sees a few, and a shared expert for all.

Letters: b batch, s tokens, d model width, e routed experts, f width of one expert, k experts per token.
"""

import functools
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.utils.generic import maybe_autocast

from ..compat.accelerate import is_offloaded, lacks_weights, weights_here
from ..compat.hooks import has_hooks
from ..compat.transformers import experts_name
from ..configuration_deepseek_v2 import DeepseekV2Config
from .adapters import unwrapped, with_adapters
from .balance import TokenDropping
from .products import Product, grouped_product, routed_sum

# routed rows (tokens x k) that pass through the experts at once where no gradient is wanted; a GPU reads all experts
# anew for each block, and has more to do in one
ROWS_PER_BLOCK = 1 << 14
ROWS_PER_BLOCK_OFF_CPU = 1 << 16
# the parameters of all experts of a layer
STACKED = ("gate_up_proj", "down_proj")
NEVER_CAME = (
    "expected the weights of all routed experts, and none came; accelerate's load_checkpoint functions drop what files "
    "have for each expert, so load the model by from_pretrained(folder, device_map=...)."
)
_ONE_EXPERT = re.compile(r"(?P<expert>\d+)\.(?P<projection>gate|up|down)_proj\.weight")


class DeepseekV2MLP(nn.Module):
    """SwiGLU: down(act(gate x) * up x), [.. d] to [.. d]."""

    def __init__(self, config: DeepseekV2Config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class DeepseekV2MoEGate(nn.Module):
    """Scores every expert for every token and picks k.

    `greedy` takes the k best of all. `group_limited_greedy` is the paper's device-limited routing: the `topk_group`
    groups with the best single expert are kept, and the k best are taken there.
    Source: DeepSeek-V2 (arXiv:2405.04434) 2.2.1, eqs. 21-22, and 2.2.2.
    """

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.is_grouped = config.topk_method == "group_limited_greedy"
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.is_normalised = config.normalizes_gates
        self.routed_scaling_factor = config.routed_scaling_factor
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))

    def forward(self, hidden_states: Tensor, dropping: TokenDropping | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens d] to router logits [tokens e], weights [tokens k] and experts [tokens k]; in float32.

        A choice that is dropped weighs 0.
        """
        logits = self.logits(hidden_states)
        weights, experts = self.choose(logits)
        if dropping is not None:
            weights = weights * dropping.kept(logits.softmax(dim=-1), experts)
        return logits, weights, experts

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts [tokens k] by the router's logits [tokens e]."""
        scores = logits.softmax(dim=-1)
        if self.is_grouped:
            scores = scores * self._mask_of_best_groups(scores)
        weights, experts = scores.topk(self.num_experts_per_tok, dim=-1, sorted=False)
        if self.is_normalised:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        else:
            weights = weights * self.routed_scaling_factor
        return weights, experts

    def logits(self, hidden_states: Tensor) -> Tensor:
        # autocast would turn the product back into half precision
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float())

    def _mask_of_best_groups(self, scores: Tensor) -> Tensor:
        """[tokens e], 1 for every expert of the kept groups and 0 elsewhere."""
        best_in_group = torch.unflatten(scores, -1, (self.n_group, -1)).amax(dim=-1)
        kept = best_in_group.topk(self.topk_group, dim=-1, sorted=False).indices
        mask = torch.zeros_like(best_in_group).scatter_(-1, kept, 1.0)
        return mask.repeat_interleave(scores.shape[-1] // self.n_group, dim=-1)


@use_experts_implementation
class DeepseekV2Experts(nn.Module):
    """All routed experts of a layer in two parameters, gate_up_proj [e 2f d] (gate rows first) and down_proj [e d f].

    `experts_implementation` names how they are multiplied; `forward` here is "eager", the plain statement of it.
    """

    # of experts of another class: what became of them, and how they become plain ones again
    state: str | None = None

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.num_experts = config.n_routed_experts
        d, f = config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * f, d))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, d, f))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens d], experts [tokens k] and weights [tokens k] to [tokens d]; summed in the weights' float32."""
        accumulator = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        output = torch.zeros_like(hidden_states, dtype=accumulator)
        # expert parallelism marks the choices of other ranks by an index past the last expert
        chosen = top_k_index[top_k_index < self.num_experts].unique().tolist()
        # a trace is replayed with other tokens, whose experts are others
        for expert in range(self.num_experts) if torch.jit.is_tracing() else chosen:
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output = output.index_add(0, token, result * top_k_weights[token, slot, None])
        return output.to(hidden_states.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """In which they are multiplied."""
        return self.down_proj.dtype

    def product(self, x: Tensor, name: str, ends: Tensor) -> Tensor:
        """A `Product` of the weights as they are."""
        return grouped_product(x, getattr(self, name), ends)

    def multiplied_by(self, product: Product, *routed: Tensor) -> Tensor:
        """`forward` with products of another kind."""
        return routed_sum(product, self.act_fn, *routed, num_experts=self.num_experts)

    def check_weights_for_peft(self) -> None:
        """Raises ValueError where peft would add adapters to stacked weights that are not what is multiplied."""

    def takes_grouped_products(self) -> bool:
        """Whether all weights are here as they are, and multiplied by grouped products or what stands for these."""
        weights = (self.gate_up_proj, self.down_proj)
        # a rank of expert parallelism has fewer
        is_whole = all(
            type(x) in (nn.Parameter, Tensor) and x.shape[0] == self.config.n_routed_experts and not x.is_meta
            for x in weights
        )
        # generate() puts the second name in place of the first while it decodes on a GPU
        return is_whole and not has_hooks(self) and experts_name(self.config) in ("grouped_mm", "batched_mm")

    def check_saving(self) -> None:
        """Raises ValueError where the files of a model would not hold the weights."""

    def check_loaded(self) -> None:
        """Raises ValueError where the weights never came, and torch's products on a CPU would read any memory."""
        if lacks_weights(self, STACKED):
            raise ValueError(NEVER_CAME)

    def _apply(self, fn, recurse: bool = True):
        try:
            return super()._apply(fn, recurse)
        except NotImplementedError as error:
            # what torch says of every tensor without data
            if self.down_proj.is_meta:
                raise ValueError(NEVER_CAME) from error
            raise

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """Also takes experts by their names in files, all of them or those of one shard.

        Trainer hands a saved checkpoint to `load_state_dict` when it resumes, and ignores names that are unknown.
        """
        # experts under an adapter are wrapped, and what is theirs does not come here
        dropped = next((key for key in state_dict if key.startswith(prefix) and ".lora_" in key), None)
        if dropped is not None:
            raise ValueError(
                f"this adapter is on routed experts ({dropped}), which its config does not name, so peft would drop it "
                "without a word; if it has experts one by one, make a copy: deepseek-latent convert adapter SRC OUT."
            )
        stacked: dict[str, Tensor] = {}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            one = _ONE_EXPERT.fullmatch(key.removeprefix(prefix))
            if one is None:
                continue
            name = "down_proj" if one["projection"] == "down" else "gate_up_proj"
            tensor, own = state_dict.pop(key), getattr(self, name).detach()
            if name not in stacked:
                # a model made on the meta device has no others; what is missing then shows
                stacked[name] = tensor.new_full(own.shape, torch.nan) if own.is_meta else own.clone()
            expert = stacked[name][int(one["expert"])]
            place = expert if name == "down_proj" else expert.chunk(2)[one["projection"] == "up"]
            place.copy_(tensor)
        state_dict.update({prefix + name: tensor for name, tensor in stacked.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


_by_name = DeepseekV2Experts.forward


@functools.wraps(_by_name)
def _also_in_float64(self: DeepseekV2Experts, *routed: Tensor) -> Tensor:
    """`forward` by the implementation that was named; torch's grouped products have no float64, and ours do."""
    if self.dtype == torch.float64 and experts_name(self.config) == "grouped_mm":
        return self.multiplied_by(self.product, *routed)
    return _by_name(self, *routed)


DeepseekV2Experts.forward = _also_in_float64


def state_of(experts: nn.Module) -> str | None:
    """What became of a layer's experts and how they become plain ones again; None if they are."""
    if not isinstance(experts, DeepseekV2Experts):
        return "under adapters; merge these, or load the model without them"
    return experts.state


def check_plain(experts: nn.Module) -> None:
    """Raises ValueError unless these are stacked weights, all of them here, that "grouped_mm" multiplies."""
    state = state_of(experts)
    if state is not None:
        raise ValueError(f"expected plain routed experts, and they are {state}.")
    implementation = experts_name(experts.config)
    if implementation != "grouped_mm":
        raise ValueError(
            f"expected routed experts that 'grouped_mm' multiplies, got {implementation!r}; call "
            "model.set_experts_implementation('grouped_mm')."
        )
    if not experts.takes_grouped_products():
        raise ValueError(
            "expected plain routed experts, and they are sharded, quantised, offloaded or watched by hooks; load the "
            "model as it is, on one device."
        )


class DeepseekV2MoE(nn.Module):
    """Routed experts, weighted by the gate, plus the shared experts, which every token passes unweighted (eq. 20)."""

    def __init__(self, config: DeepseekV2Config):
        super().__init__()
        self.gate = DeepseekV2MoEGate(config)
        self.experts = DeepseekV2Experts(config)
        self.num_experts_per_tok = config.num_experts_per_tok
        # side by side, the shared experts are one wider MLP
        self.shared_experts = (
            None
            if config.n_shared_experts is None
            else DeepseekV2MLP(config, config.n_shared_experts * config.moe_intermediate_size)
        )

    def forward(self, hidden_states: Tensor, dropping: TokenDropping | None = None) -> Tensor:
        tokens = hidden_states.flatten(0, 1)
        _, weights, experts = self.gate(tokens, dropping)
        output = self._routed(tokens, experts, weights).view_as(hidden_states)
        return output if self.shared_experts is None else output + self.shared_experts(hidden_states)

    def _routed(self, tokens: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        rows = ROWS_PER_BLOCK if tokens.device.type == "cpu" else ROWS_PER_BLOCK_OFF_CPU
        per_block = max(rows // self.num_experts_per_tok, 1)
        # adapters are put beside weights that are read here, and not only by the experts' own forward
        is_plain = isinstance(self.experts, DeepseekV2Experts)
        inside = self.experts if is_plain else getattr(self.experts, "get_base_layer", lambda: None)()
        if isinstance(inside, DeepseekV2Experts) and not tokens.is_meta:
            inside.check_loaded()
        with nullcontext() if is_plain else weights_here(self.experts):
            multiply = self._multiplier()
            if torch.is_grad_enabled() or torch.jit.is_tracing() or tokens.shape[0] <= per_block:
                return multiply(tokens, experts, weights)
            blocks = zip(tokens.split(per_block), experts.split(per_block), weights.split(per_block))
            return torch.cat([multiply(*block) for block in blocks])

    def _multiplier(self) -> Callable[..., Tensor]:
        """The experts, with peft's adapters beside them where these can be read; else peft applies them as it does."""
        if isinstance(self.experts, DeepseekV2Experts):
            return self.experts
        experts, factors = unwrapped(self.experts) or (self.experts.get_base_layer(), None)
        if isinstance(experts, DeepseekV2Experts) and factors != {}:
            if is_offloaded(experts) and factors is None:
                raise ValueError(
                    "expected plain LoRA, unmerged and the same for all rows, on offloaded routed experts; load the "
                    "model with a device_map that offloads none."
                )
            # calling offloaded ones would fetch the weights without the adapters, whatever multiplies them else
            if factors and (is_offloaded(experts) or experts.takes_grouped_products()):
                return partial(experts.multiplied_by, with_adapters(experts.product, factors, experts.dtype))
            experts.check_weights_for_peft()
        return self.experts
