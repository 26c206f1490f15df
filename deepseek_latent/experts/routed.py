"""The routed experts of one layer, as torch, transformers and peft see them: a module with two stacked weights.

Letters: e routed experts, d model width, f width of one expert, k experts per token.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from ..compat.accelerate import lacks_weights
from ..compat.peft_changes import check_no_lora_dropped
from ..compat.tensor_parallel import is_split
from ..compat.transformers import experts_name
from ..configuration_deepseek_v2 import DeepseekV2Config
from .names import STACKED, parse_name_of_expert, split_projections, stacked_name
from .products import Product
from .weights import ExpertWeights, StackedWeights

WEIGHTS_MISSING = (
    "expected the weights of all routed experts, and none were loaded; accelerate's load_checkpoint functions drop the "
    "matrices that files hold for each expert, so load the model with from_pretrained(folder, device_map=...)."
)


@use_experts_implementation
class StackedExperts(nn.Module):
    """All routed experts of a layer in two parameters, gate_up_proj [e 2f d] (gate rows first) and down_proj [e d f].

    `experts_implementation` names how transformers multiplies them; `forward` is "eager", the plainest implementation.
    """

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
        # a trace is replayed with other tokens, which choose other experts
        for expert in range(self.num_experts) if torch.jit.is_tracing() else chosen:
            token, slot = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            result = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output = output.index_add(0, token, result * top_k_weights[token, slot, None])
        return output.to(hidden_states.dtype)


class DeepseekV2Experts(StackedExperts):
    """Routed experts whose `weights` decide how they are stored and multiplied; at first they are stacked."""

    def __init__(self, config: DeepseekV2Config):
        super().__init__(config)
        self._weights: ExpertWeights = StackedWeights()
        self._weights.experts = self
        # what `call_with` multiplies by in place of the weights' own product
        self._product: Product | None = None
        # what expert parallelism may compute while tokens travel, part by part
        self.meanwhile: list[Callable[[], None]] = []
        # how many tokens the last call sent to each process, if the implementation is "device_limited"
        self.tokens_sent: list[int] = []

    @property
    def has_all(self) -> bool:
        """Whether this process has all experts of the layer; expert parallelism gives it only some."""
        return self.num_experts == self.config.n_routed_experts

    @property
    def weights(self) -> ExpertWeights:
        """How the experts are stored. Assigning others makes stacked weights of these, and stores those the new way."""
        return self._weights

    @weights.setter
    def weights(self, weights: ExpertWeights) -> None:
        weights.experts, weights.operators = self, self._weights.operators
        self._weights.give_back()
        # if the new weights cannot be made, the stacked ones are what is there
        self._weights = StackedWeights()
        self._weights.experts, self._weights.operators = self, weights.operators
        weights.take_over()
        self._weights = weights

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        routed = hidden_states, top_k_index, top_k_weights
        if self._product is not None:
            return self._weights.forward_with(self._product, *routed)
        return self._weights.forward(*routed)

    def call_with(self, product: Product, *routed: Tensor) -> Tensor:
        """Calls these experts, with hooks and exchanges of tokens, so that `product` multiplies the weights."""
        self._product = product
        try:
            return self(*routed)
        finally:
            self._product = None

    def forward_stacked(self, *routed: Tensor) -> Tensor:
        """`forward` of stacked weights, by the implementation that `experts_implementation` names."""
        return super().forward(*routed)

    def extra_repr(self) -> str:
        e, d, f = self.down_proj.shape
        return f"{e} experts of width {f}, hidden size {d}, {self._weights.name}"

    def check_loaded(self) -> None:
        """Raises ValueError if the weights were never loaded; torch's products on a CPU would read arbitrary memory."""
        if lacks_weights(self, STACKED):
            raise ValueError(WEIGHTS_MISSING)

    def _apply(self, fn, recurse: bool = True):
        try:
            with self._weights.protected_from_casts():
                return super()._apply(fn, recurse)
        except NotImplementedError as error:
            # torch raises this for every tensor without data
            if self.down_proj.is_meta:
                raise ValueError(WEIGHTS_MISSING) from error
            raise

    def _replicate_for_data_parallel(self):
        replica = super()._replicate_for_data_parallel()
        replica._weights = copy.copy(self._weights)
        replica._weights.experts = replica
        return replica

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        self._weights.sync()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        self._weights.after_save(destination, prefix)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, *args) -> None:
        """Also takes experts by their names in files, all of them or those of one shard.

        Trainer hands a saved checkpoint to `load_state_dict` when it resumes, and ignores names that are unknown.
        """
        # peft's wrapper loads the weights of an adapter on the experts, so any that come here have no wrapper
        check_no_lora_dropped(key for key in state_dict if key.startswith(prefix))
        # a shard may hold some of the experts, and then the others keep their stacked weights
        self._weights.sync()
        self._stack(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *args)
        missing_keys[:] = [key for key in missing_keys if key.removeprefix(prefix) not in self._weights.unsaved]
        self._weights.after_load({key.removeprefix(prefix) for key in state_dict if key.startswith(prefix)})

    def _stack(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Replaces the matrices of single experts in `state_dict` by stacked weights."""
        stacked: dict[str, Tensor] = {}
        for key in [key for key in state_dict if key.startswith(prefix)]:
            found = parse_name_of_expert(key.removeprefix(prefix))
            if found is None:
                continue
            expert, projection = found
            name = stacked_name(projection)
            tensor, own = state_dict.pop(key), getattr(self, name).detach()
            if name not in stacked:
                # a model on the meta device has no weights to keep; NaN shows what is missing then
                stacked[name] = tensor.new_full(own.shape, torch.nan) if own.is_meta else own.clone()
            split_projections(name, stacked[name][expert])[projection].copy_(tensor)
        state_dict.update({prefix + name: tensor for name, tensor in stacked.items()})


def check_plain(experts: nn.Module) -> None:
    """Raises ValueError unless these are stacked weights, all of them in memory, that "grouped_mm" multiplies."""
    check_stacked(experts)
    if is_split(experts.down_proj):
        raise ValueError(
            "expected whole routed experts, and these are split over processes; load the model without "
            "distributed_config."
        )
    implementation = experts_name(experts.config)
    if implementation != "grouped_mm":
        raise ValueError(
            f"expected routed experts that 'grouped_mm' multiplies, got {implementation!r}; call "
            "model.set_experts_implementation('grouped_mm')."
        )
    if not experts.weights.is_plain:
        raise ValueError(
            "expected plain routed experts, and they are sharded, quantized, offloaded or watched by hooks; load the "
            "model without that, on one device."
        )


def not_stacked(weights: ExpertWeights) -> ValueError:
    """An error that says how experts are stored, and what makes stacked weights of them."""
    return ValueError(
        f"expected plain routed experts, and they are {weights.name}; {weights.way_back} makes them plain."
    )


def check_stacked(experts: nn.Module) -> None:
    """Raises ValueError where experts have adapters around them, or are not stored as stacked weights."""
    if not isinstance(experts, DeepseekV2Experts):
        raise ValueError(
            "expected plain routed experts, and they have adapters; merge these, or load the model without them."
        )
    weights = experts.weights
    if weights.way_back is not None:
        raise not_stacked(weights)
    if weights.operators is not None:
        raise ValueError(
            "expected plain routed experts, and they are optimized for inference; undo() of what "
            "optimize_for_inference(model) returned makes them plain."
        )
