"""MHA, GQA and MQA (Llama and architectures with equal Llamas) as latent attention, exactly.

Letters: d model width, h query heads, g key heads, w width of a source head, n/r/v content, rotary and value width per
head, c KV latent width, a query latent width.

The rotary key holds the keys of all heads side by side, r = g w, and a query head is zero except at its key head. The
latent holds the values of all heads side by side, each rotated to channels that are alike (`value_rotation`), and
`kv_b_proj` selects those of a head and rotates them back. Elements of keys that do not rotate are in the latent too:
they become the content of keys, whose width is n. Two obstacles remain:

1. RoPE rotates the pairs of every head at the same frequencies. A longrope table repeats them g times.
2. The latent is normalized. A constant channel, much larger than the others, dominates the norm, and the norm's weight
   undoes it. After the norm that channel is 0, or about 1 if it carries a bias. At its size before the norm, it would
   dominate the first training step.
"""

import functools
import math

import torch
from torch import Tensor

from ..configuration_deepseek_v2 import DeepseekV2Config
from .latent_basis import hartley, value_rotation
from .llama_source import LlamaSource
from .rope_table import interleave, rope_frequencies, rope_parameters
from .source import Source
from .target import Piece

# width of the content of queries and keys if all elements rotate: it is zero, but DeepSeek-V2 must have one
CONTENT_WIDTH = 8
# ratio of the constant channel to the latent: values shrink by half of its inverse square, 5e-9
CONSTANT_OVER_LATENT = 1e4
MAX_EPS = 1e-4  # beyond it, normalizing the normalized input again changes it visibly
LATENT_EPS = 1e-6  # eps of the latents' norms, independent of rms_norm_eps
_COPIED_FIELDS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_COPIED_FIELDS += ("max_position_embeddings", "initializer_range", "tie_word_embeddings")
# token ids are copied even if they are None, because DeepSeek's defaults are other tokens
_COPIED_FIELDS += ("hidden_act", "bos_token_id", "eos_token_id", "pad_token_id")


class GqaToMla:
    """A `LlamaSource` as DeepSeek-V2: `config`, and the `pieces` of its files.

    With `bias_free`, the latent is the whole normalized input of a layer, rotated, which needs no constant channel.
    That is the layout of the release, without biases, at the price of a wider cache (d + g w) and an error from the
    norms' eps.

    Raises ValueError for any other source, naming what cannot be converted.
    """

    def __init__(self, files: Source, *, bias_free: bool = False):
        self.source = source = LlamaSource(files)
        self.bias_free = bias_free
        if bias_free and source.projections_with_bias:
            raise ValueError("--bias-free needs a source without biases in attention; leave it out.")
        if bias_free and source.norm_eps > MAX_EPS:
            raise ValueError(
                f"--bias-free needs an rms_norm_eps of at most {MAX_EPS}, because its latent is normalized twice, got "
                f"{source.norm_eps}; leave it out."
            )
        self.d, self.h, self.g, self.w = source.d, source.h, source.g, source.w
        # elements of a head that do not rotate, in the layer that has most of them
        self.resting = self.w if source.has_layers_without_rope else self.w - source.rotary_width
        self.r, self.n = self.g * source.rotary_width, self.resting or CONTENT_WIDTH
        self.latent_width = self.g * (self.w + self.resting)  # without the constant
        self.c = self.d if bias_free else _width_with_constant(self.latent_width)
        self.num_unquantized = 0
        self.a = _width_with_constant(self.d) if "q_proj" in source.projections_with_bias else None
        # DeepSeek-V2 divides scores by sqrt(n + r), the source by sqrt(w)
        self.query_scale = math.sqrt((self.n + self.r) / self.w)

    @functools.cached_property
    def config(self) -> DeepseekV2Config:
        origin = self.source.config
        copied = {name: getattr(origin, name) for name in _COPIED_FIELDS}
        return DeepseekV2Config(
            **copied,
            rms_norm_eps=self.source.norm_eps,
            use_cache=bool(origin.use_cache),  # some classes allow None
            dtype=self.source.dtype,
            architectures=["DeepseekV2ForCausalLM"],
            num_key_value_heads=self.h,
            q_lora_rank=self.a,
            kv_lora_rank=self.c,
            qk_nope_head_dim=self.n,
            qk_rope_head_dim=self.r,
            v_head_dim=self.w,
            attention_bias=not self.bias_free,
            num_unquantized_channels=self.num_unquantized,
            source_cached_width=self.source.cached_elements // origin.num_hidden_layers,
            rope_parameters=self.rope_parameters(),
            # all layers are dense, but transformers' own class needs the numbers of experts
            first_k_dense_replace=origin.num_hidden_layers,
            n_routed_experts=1,
            n_shared_experts=1,
            num_experts_per_tok=1,
            moe_intermediate_size=origin.intermediate_size,
        )

    def rope_parameters(self) -> dict:
        frequencies, factor = rope_frequencies(self.source.config, self.w)
        rotating = frequencies[: self.source.rotary_width // 2]
        return rope_parameters(self.source.config, rotating.repeat(self.g), factor)

    def pieces(self) -> list[Piece]:
        """Every tensor of the new checkpoint, in the order of the layers."""
        source = self.source
        pieces = [source.piece("model.embed_tokens.weight")]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            pieces += self._attention(layer)
            rest = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"]
            rest += [] if self.bias_free else ["input_layernorm"]
            pieces += [source.piece(f"{prefix}{name}.weight") for name in rest]
        pieces.append(source.piece("model.norm.weight"))
        if "lm_head.weight" in source.files:
            pieces.append(source.piece("lm_head.weight"))
        return pieces

    def _attention(self, layer: int) -> list[Piece]:
        d, h, n, r, c, a, v = self.d, self.h, self.n, self.r, self.c, self.a, self.w
        made = {
            "kv_a_proj_with_mqa.weight": ((c + r, d), self._kv_a_weight),
            "kv_a_layernorm.weight": ((c,), self._kv_norm_weight),
            "kv_b_proj.weight": ((h * (n + v), c), self._kv_b_weight),
            "o_proj.weight": ((d, h * v), lambda layer: self.source.weight(layer, "o_proj")),
        }
        if a is None:
            made["q_proj.weight"] = ((h * (n + r), d), self._query_weight)
        else:
            made |= {
                "q_a_proj.weight": ((a, d), lambda layer: torch.eye(a, d)),
                "q_a_proj.bias": ((a,), lambda layer: _one_hot(a, d, self._query_constant(layer))),
                "q_a_layernorm.weight": ((a,), self._query_norm_weight),
                "q_b_proj.weight": ((h * (n + r), a), self._query_weight_with_bias),
            }
        if not self.bias_free:
            made["kv_a_proj_with_mqa.bias"] = ((c + r,), self._kv_a_bias)
            made["o_proj.bias"] = ((d,), lambda layer: self.source.bias(layer, "o_proj"))
        prefix, dtype = f"model.layers.{layer}.", self.source.dtype

        def piece(name: str, shape: tuple[int, ...], make) -> Piece:
            return Piece(prefix + name, shape, dtype, lambda: make(layer).to(dtype))

        pieces = [piece(f"self_attn.{name}", shape, make) for name, (shape, make) in made.items()]
        if self.bias_free:
            # its weight is part of the projections that read it
            pieces.append(piece("input_layernorm.weight", (d,), lambda layer: torch.ones(d)))
        return pieces

    # the tensors of one layer, in float32

    def _query_weight(self, layer: int) -> Tensor:
        """[h(n+r) d]: the rotary part is zero except at the head's key."""
        queries = self._weight_with_norm(layer, "q_proj").unflatten(0, (self.h, self.w))
        return self._place_queries(layer, queries * self.query_scale)

    def _query_weight_with_bias(self, layer: int) -> Tensor:
        """[h(n+r) a]: maps a latent that holds the input and a constant, whose column holds the bias."""
        bias = self.source.bias(layer, "q_proj") / constant_after_norm(self.a)
        weight = torch.cat((self.source.weight(layer, "q_proj"), bias[:, None]), dim=1)
        weight = torch.nn.functional.pad(weight, (0, self.a - self.d - 1))
        return self._place_queries(layer, weight.unflatten(0, (self.h, self.w)) * self.query_scale)

    def _place_queries(self, layer: int, queries: Tensor) -> Tensor:
        """[h w k] to [h(n+r) k]: what rotates at the place of the key head, after the content."""
        resting, rotating = self._split_heads(layer, queries)
        wide = queries.new_zeros(self.h, self.n + self.r, queries.shape[-1])
        wide[:, : self.resting] = resting
        for head, query in enumerate(rotating):
            start = self.n + head // (self.h // self.g) * len(query)
            wide[head, start : start + len(query)] = query
        return wide.flatten(0, 1)

    def _split_heads(self, layer: int, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Queries or keys [heads w k] in DeepSeek's order: the elements that do not rotate, and those that do.

        The widths are those of all layers, so a layer without RoPE has zeros for the latter, and others may have zeros
        for the former.
        """
        num_rotating = self.source.rotary_width if self.source.has_rope(layer) else 0
        ordered = torch.stack([interleave(head) for head in heads])
        rotating, resting = ordered.split((num_rotating, self.w - num_rotating), dim=1)

        def pad(x: Tensor, width: int) -> Tensor:
            return torch.nn.functional.pad(x, (0, 0, 0, width - x.shape[1]))

        return pad(resting, self.resting), pad(rotating, self.source.rotary_width)

    def _kv_a_weight(self, layer: int) -> Tensor:
        """[c+r d]: the values, resting keys and zeros for the constant, or the rotated input; then the rotary keys."""
        keys = self._weight_with_norm(layer, "k_proj").unflatten(0, (self.g, self.w))
        resting, rotating = (part.flatten(0, 1) for part in self._split_heads(layer, keys))
        if self.bias_free:
            return torch.cat((self._input_rotation, rotating))
        latent = torch.cat((self._rotate_values(self.source.weight(layer, "v_proj")), resting))
        return torch.cat((latent, latent.new_zeros(self.c - len(latent), self.d), rotating))

    def _kv_a_bias(self, layer: int) -> Tensor:
        values, keys = (self.source.bias(layer, name) for name in ("v_proj", "k_proj"))
        resting, rotating = (x.flatten() for x in self._split_heads(layer, keys.view(self.g, self.w, 1)))
        constant = _one_hot(self.c - self.latent_width, 0, self._kv_constant(layer))
        return torch.cat((self._rotate_values(values), resting, constant, rotating))

    def _rotate_values(self, values: Tensor) -> Tensor:
        """Values [g w ..] of every head in the basis of the latent."""
        there, _ = value_rotation(self.w)
        return (there @ values.view(self.g, self.w, -1)).view_as(values)

    @functools.cached_property
    def _input_rotation(self) -> Tensor:
        """[d d]: orthogonal, so that the norm stays the same; it spreads the input's few huge channels over all."""
        return hartley(self.d).float()

    def _kv_norm_weight(self, layer: int) -> Tensor:
        if self.bias_free:
            return torch.ones(self.c)
        norm = inverse_norm_weight(self.c, self._kv_constant(layer))
        norm[self.latent_width] = 0  # nothing after the norm reads the constant
        return norm

    def _query_norm_weight(self, layer: int) -> Tensor:
        norm = inverse_norm_weight(self.a, self._query_constant(layer))
        norm[self.d] = constant_norm_weight(self.a)
        return norm

    def _kv_b_weight(self, layer: int) -> Tensor:
        """[h(n+v) c]: values are rotated back from the latent and resting keys selected, or computed from the input."""
        if self.bias_free:
            back = self._input_rotation.T
            values = self._weight_with_norm(layer, "v_proj") @ back
            keys = (self._weight_with_norm(layer, "k_proj") @ back).unflatten(0, (self.g, self.w))
            keys = self._split_heads(layer, keys)[0].flatten(0, 1)
        else:
            values = torch.block_diag(*[value_rotation(self.w)[1]] * self.g)
            values = torch.nn.functional.pad(values, (0, self.c - len(values)))
            keys = torch.eye(self.latent_width, self.c)[self.g * self.w :]
        expand = torch.zeros(self.h, self.n + self.w, self.c)
        for head, part in enumerate(expand):
            key_head = head // (self.h // self.g)
            part[: self.resting] = keys.unflatten(0, (self.g, self.resting))[key_head]
            part[self.n :] = values.unflatten(0, (self.g, self.w))[key_head]
        return expand.flatten(0, 1)

    def _kv_constant(self, layer: int) -> float:
        names = ("v_proj", "k_proj") if self.resting else ("v_proj",)
        weight = torch.cat([self.source.weight(layer, name) for name in names]) * self.source.input_norm(layer)
        bias = torch.cat([self.source.bias(layer, name) for name in names])
        return self._choose_constant(self.c, weight.norm().item() * math.sqrt(self.d) + bias.norm().item())

    def _query_constant(self, layer: int) -> float:
        return self._choose_constant(self.a, math.sqrt(self.d) * self.source.input_norm(layer).abs().max().item())

    def _choose_constant(self, width: int, largest: float) -> float:
        """At least CONSTANT_OVER_LATENT times the largest norm, and exact in any dtype, as is the norm's weight."""
        constant = math.sqrt(width) * 2.0 ** math.ceil(math.log2(max(CONSTANT_OVER_LATENT * largest, 1e-3)))
        if constant > torch.finfo(self.source.dtype).max:
            raise ValueError(
                f"an exact conversion needs a constant of {constant:.3g}, which {self.source.dtype} does not hold; "
                "load the source in bfloat16 with transformers and save it, or leave the constant out with --bias-free."
            )
        return constant

    def check_dtype(self) -> None:
        """Raises ValueError if the source's dtype cannot hold the constant of its first layer."""
        if not self.bias_free:
            self._kv_constant(0)

    def _weight_with_norm(self, layer: int, projection: str) -> Tensor:
        """A projection's weight, multiplied by the weight of the norm before it if the new norm has none."""
        weight = self.source.weight(layer, projection)
        return weight * self.source.input_norm(layer) if self.bias_free else weight


def _width_with_constant(width: int) -> int:
    """The least even square above `width`. Its root, a factor of the constant, is exact in any dtype."""
    root = math.isqrt(width) + 1
    return (root + root % 2) ** 2


def _one_hot(width: int, place: int, value: float) -> Tensor:
    x = torch.zeros(width)
    x[place] = value
    return x


def constant_norm_weight(width: int) -> float:
    """The norm's weight for a constant that carries a bias: a power of two, after which the constant is about 1."""
    return 2.0 ** -round(math.log2(math.sqrt(width)))


def constant_after_norm(width: int) -> float:
    """The value of that constant after a norm over `width` channels, which it dominates."""
    return math.sqrt(width) * constant_norm_weight(width)


def inverse_norm_weight(width: int, constant: float) -> Tensor:
    """The weight with which a norm over `width` channels, one of them the constant, leaves the others unchanged."""
    return torch.full((width,), math.sqrt(constant**2 / width + LATENT_EPS))
