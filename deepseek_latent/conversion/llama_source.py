"""The checkpoint to convert as a Llama: whatever its architecture is, its tensors are those of an equal Llama.

Letters: d model width, h query heads, g key heads, w width of a head.

A scale of scores is part of `q_proj`, of embeddings part of `embed_tokens`, of the residual stream part of `o_proj` and
`down_proj`, of logits part of the last norm. Norms that subtract the mean need not if the residual stream has a mean of
zero, which is subtracted from the weights that write to it. Two differences remain, which attention must know: how many
elements of a head rotate, and in which layers.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .architectures import FUSED, architecture_of, head_width
from .checkpoint import common_dtype
from .source import Source
from .source_config import read_source_config
from .target import Piece

_COMPUTED = "rotary_emb.inv_freq"  # old files hold these frequencies, which every loader computes
_EMBEDDING, _LAST_NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class LlamaSource:
    """The tensors of the checkpoint by Llama's names.

    In queries and keys, RoPE rotates element i of a head with i + w/2. If some elements do not rotate, these are the
    last ones of both halves.

    Raises ValueError for another architecture, for a feature that DeepSeek-V2 does not have, and for a tensor that is
    missing, unexpected or of the wrong shape.
    """

    def __init__(self, files: Source):
        self.files = files
        self.config = config = read_source_config(files)
        self.architecture = architecture_of(config)
        self.d = config.hidden_size
        self.h, self.g = config.num_attention_heads, config.num_key_value_heads
        self.w = head_width(config)
        self.norm_eps, self.rotary_width = self.architecture.norm_eps, self.architecture.rotary_width
        self.projections_with_bias = self.architecture.biases
        self.shapes = self._shapes()
        self._check_tensors()
        stored = {name: tensor.dtype for name, tensor in files.tensors.items() if not name.endswith(_COMPUTED)}
        # config.json may say another
        self.dtype = common_dtype(stored, files.folder)

    @property
    def cached_elements(self) -> int:
        """Cache elements per token over all layers, keys and values."""
        return 2 * self.g * self.w * self.config.num_hidden_layers

    @property
    def has_layers_without_rope(self) -> bool:
        return bool(self.architecture.layers_without_rope)

    def has_rope(self, layer: int) -> bool:
        return layer not in self.architecture.layers_without_rope

    def weight(self, layer: int, projection: str) -> Tensor:
        """In float32, as the other tensors from which new ones are computed."""
        return self._read(f"model.layers.{layer}.self_attn.{projection}.weight", torch.float32)

    def bias(self, layer: int, projection: str) -> Tensor:
        """The bias, or zeros if there is none."""
        if projection not in self.projections_with_bias:
            return torch.zeros(self.shapes[f"model.layers.{layer}.self_attn.{projection}.weight"][0])
        return self._read(f"model.layers.{layer}.self_attn.{projection}.bias", torch.float32)

    def affine(self, layer: int, projection: str) -> Tensor:
        """[out d+1] in float64: the weight, and the bias as its last column."""
        return torch.cat((self.weight(layer, projection), self.bias(layer, projection)[:, None]), dim=1).double()

    def input_norm(self, layer: int) -> Tensor:
        return self._read(f"model.layers.{layer}.input_layernorm.weight", torch.float32)

    def piece(self, name: str) -> Piece:
        """The tensor for the new checkpoint: copied unchanged if the source has it as a Llama would."""
        if name in self.files and not self._steps(name):
            return self.files.piece(name)
        return Piece(name, self.shapes[name], self.dtype, functools.partial(self._read, name, self.dtype))

    def _read(self, name: str, dtype: torch.dtype) -> Tensor:
        if self._is_absent_norm(name):
            return torch.ones(self.shapes[name], dtype=dtype)
        x = self.files[self._stored_name(name)]
        # operands of later computations must not be rounded twice; the other large tensors take less memory as they are
        x = x.float() if dtype == torch.float32 or x.dim() == 1 else x
        for step in (steps := self._steps(name)):
            x = step(x)
        x = x.to(dtype)
        if steps and not x.isfinite().all():
            raise ValueError(
                f"{dtype} does not hold {name} of {self.files.folder} with the factors of its architecture; load the "
                "source in bfloat16 with transformers and save it."
            )
        return x

    def _steps(self, name: str) -> list[Callable[[Tensor], Tensor]]:
        """What makes the stored tensor that of an equal Llama."""
        architecture, steps = self.architecture, []
        projection = name.split(".")[-2]
        is_embedding = name == _EMBEDDING or (name == _HEAD and self.config.tie_word_embeddings)
        if (stored_name := self._stored_name(name)) != name:
            steps.append(functools.partial(self._take_rows, name, stored_name))
        is_other_order = architecture.interleaves_pairs or self.rotary_width < self.w
        if projection in ("q_proj", "k_proj") and is_other_order:
            steps.append(self._in_halves)
        if architecture.norm_offset and "norm" in projection:
            steps.append(lambda x: x + architecture.norm_offset)
        if architecture.centers_norms and (is_embedding or projection in ("o_proj", "down_proj")):
            # the last axis of an embedding is d, the first one of a weight or bias
            steps.append(functools.partial(_center, dim=-1 if is_embedding else 0))
        scale = 1.0
        if projection == "q_proj":
            scale = architecture.score_scale
        elif projection in ("o_proj", "down_proj"):
            scale = architecture.residual_scale
        elif is_embedding:
            scale = architecture.embedding_scale
        elif name == _LAST_NORM:
            # a tied head has the scale of the embedding
            tied_scale = architecture.embedding_scale if self.config.tie_word_embeddings else 1.0
            scale = architecture.logits_scale / tied_scale
        if scale != 1:
            steps.append(lambda x: x * scale)
        return steps

    def _take_rows(self, name: str, stored_name: str, x: Tensor) -> Tensor:
        """The rows of one projection in a fused one."""
        projection, fused = name.split(".")[-2], stored_name.split(".")[-2]
        rows = [self.shapes[name.replace(projection, part)][0] for part in FUSED[fused]]
        return x.split(rows)[FUSED[fused].index(projection)]

    def _in_halves(self, x: Tensor) -> Tensor:
        """Rows [heads w ..] as in a Llama, where i rotates with i + w/2. Those that do not rotate end both halves."""
        rotating, resting = x.unflatten(0, (-1, self.w)).split((self.rotary_width, self.w - self.rotary_width), dim=1)
        if self.architecture.interleaves_pairs:
            rotating = rotating.unflatten(1, (-1, 2)).transpose(1, 2)
        else:
            rotating = rotating.unflatten(1, (2, -1))
        return torch.cat((rotating, resting.unflatten(1, (2, -1))), dim=2).flatten(0, 2)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of a Llama's tensors by their names."""
        d, vocab, inner = self.d, self.config.vocab_size, self.config.intermediate_size
        heads, keys = self.h * self.w, self.g * self.w
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        layer |= {"mlp.gate_proj": (inner, d), "mlp.up_proj": (inner, d), "mlp.down_proj": (d, inner)}
        attention = {"q_proj": (heads, d), "k_proj": (keys, d), "v_proj": (keys, d), "o_proj": (d, heads)}
        layer |= {f"self_attn.{name}": shape for name, shape in attention.items()}
        shapes = {_EMBEDDING: (vocab, d), _LAST_NORM: (d,), _HEAD: (vocab, d)}
        for i in range(self.config.num_hidden_layers):
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
            shapes |= {
                f"model.layers.{i}.self_attn.{name}.bias": attention[name][:1] for name in self.projections_with_bias
            }
        return shapes

    def _stored_name(self, name: str) -> str:
        """The name of the tensor in the files that holds the one that Llama has under `name`."""
        projection = name.split(".")[-2]
        fused = next((each for each in self.architecture.fused if projection in FUSED[each]), projection)
        return name.replace(projection, fused)

    def _is_absent_norm(self, name: str) -> bool:
        return self.architecture.centers_norms and "norm" in name

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for name, (rows, *rest) in self.shapes.items():
            if not self._is_absent_norm(name):
                place = self._stored_name(name)
                expected[place] = (expected.get(place, (0,))[0] + rows, *rest)
        for name, shape in expected.items():
            if name not in self.files and not (name == _HEAD and self.config.tie_word_embeddings):
                raise ValueError(f"expected {name} {list(shape)} in {self.files.folder}, found none; complete it.")
        for name, stored in self.files.tensors.items():
            if name.endswith(_COMPUTED):
                continue
            shape = expected.get(name)
            if shape != stored.shape:
                expectation = f"expected {list(shape)}" if shape else "which DeepSeek-V2 does not have"
                raise ValueError(f"{name} has shape {list(stored.shape)}, {expectation}; it cannot be converted.")


def _center(x: Tensor, dim: int) -> Tensor:
    """Subtracts the mean over the model width, in float32."""
    return x.float() - x.float().mean(dim=dim, keepdim=True)
