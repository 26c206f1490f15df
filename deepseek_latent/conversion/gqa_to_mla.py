"""MHA, GQA and MQA (Llama, Mistral, Qwen2) as latent attention, exactly.

Letters: d model width, h query heads, g key heads, w width of a source head, n/r/v content, rotary and value width per
head, c KV latent width, a query latent width.

Keys keep their rotation, so all of them lie side by side in the rotary key, r = g w, and every query head is zero but
where its key head lies. Values lie side by side in the latent, from which `kv_b_proj` takes those of a head. Two things
stand in the way. RoPE turns the pairs of g heads at the same w/2 frequencies, which is a table with repetitions; and
the latent is normalised, which is undone by a constant channel, so large that the norm is that of the channel. Behind
the norm that channel is 0, or about 1 where it carries a bias: as large as before it, it would drown the first step of
training.
"""

import functools
import math

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..configuration_deepseek_v2 import DeepseekV2Config
from .llama_source import LlamaSource
from .source import Source
from .target import Piece

CONTENT_WIDTH = 8  # of queries and keys without rotation; all zero, and DeepSeek-V2 has to have some
# how much larger than the latent the constant channel is: values shrink by half of its inverse square, 5e-9
CONSTANT_OVER_LATENT = 1e4
LATENT_EPS = 1e-6  # of the latents' norms, whatever rms_norm_eps is
_KEPT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
_KEPT += ("max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings")
_KEPT += ("bos_token_id", "eos_token_id", "pad_token_id", "dtype")  # None too: DeepSeek's defaults are other tokens


class GqaToMla:
    """A Llama, Mistral or Qwen2 checkpoint as DeepSeek-V2: `config`, and the `pieces` its files are made of.

    With `bias_free`, the latent is the whole normalised input of a layer, which needs no constant channel: the layout
    of the release without a bias, at the price of a wider cache (d + g w) and of an error by the norms' eps.

    Raises:
        ValueError: for a source that is no such model, naming what cannot be converted.
    """

    def __init__(self, files: Source, *, bias_free: bool = False):
        self.source = source = LlamaSource(files)
        self.bias_free = bias_free
        if bias_free and source.biased:
            raise ValueError("--bias-free needs a source without biases in attention; leave it out.")
        self.d, self.h, self.g, self.w = source.d, source.h, source.g, source.w
        self.r, self.n = self.g * self.w, CONTENT_WIDTH
        self.c = self.d if bias_free else _room_for_constant(self.g * self.w)
        self.a = _room_for_constant(self.d) if "q_proj" in source.biased else None
        # scores are divided by the root of n + r here, by that of w there
        self.query_scale = math.sqrt((self.n + self.r) / self.w)

    @functools.cached_property
    def config(self) -> DeepseekV2Config:
        origin = self.source.config
        kept = {name: getattr(origin, name) for name in _KEPT}
        return DeepseekV2Config(
            **kept,
            architectures=["DeepseekV2ForCausalLM"],
            num_key_value_heads=self.h,
            q_lora_rank=self.a,
            kv_lora_rank=self.c,
            qk_nope_head_dim=self.n,
            qk_rope_head_dim=self.r,
            v_head_dim=self.w,
            attention_bias=not self.bias_free,
            rope_parameters=self.rope(),
            # all layers are dense; transformers' own class wants numbers for the experts that there are not
            first_k_dense_replace=origin.num_hidden_layers,
            n_routed_experts=1,
            n_shared_experts=1,
            num_experts_per_tok=1,
            moe_intermediate_size=origin.intermediate_size,
        )

    def rope(self) -> dict:
        frequencies, factor = frequencies_of(self.source.config, self.w)
        return rope_table(self.source.config, frequencies.repeat(self.g), factor)

    def pieces(self) -> list[Piece]:
        """Every tensor of the new checkpoint, in the order of the layers."""
        files = self.source.files
        pieces = [files.piece("model.embed_tokens.weight")]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            pieces += self._attention(layer)
            rest = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "post_attention_layernorm"]
            rest += [] if self.bias_free else ["input_layernorm"]
            pieces += [files.piece(f"{prefix}{name}.weight") for name in rest]
        pieces.append(files.piece("model.norm.weight"))
        if "lm_head.weight" in files:
            pieces.append(files.piece("lm_head.weight"))
        return pieces

    def _attention(self, layer: int) -> list[Piece]:
        d, h, n, r, c, a, v = self.d, self.h, self.n, self.r, self.c, self.a, self.w
        made = {
            "kv_a_proj_with_mqa.weight": ((c + r, d), self._compress),
            "kv_a_layernorm.weight": ((c,), self._latent_norm),
            "kv_b_proj.weight": ((h * (n + v), c), self._expand),
            "o_proj.weight": ((d, h * v), lambda layer: self.source.weight(layer, "o_proj")),
        }
        if a is None:
            made["q_proj.weight"] = ((h * (n + r), d), self._queries)
        else:
            made |= {
                "q_a_proj.weight": ((a, d), lambda layer: torch.eye(a, d)),
                "q_a_proj.bias": ((a,), lambda layer: _one_hot(a, d, self._input_constant(layer))),
                "q_a_layernorm.weight": ((a,), self._input_norm),
                "q_b_proj.weight": ((h * (n + r), a), self._queries_with_bias),
            }
        if not self.bias_free:
            made["kv_a_proj_with_mqa.bias"] = ((c + r,), self._compress_bias)
            made["o_proj.bias"] = ((d,), lambda layer: self.source.bias(layer, "o_proj"))
        prefix, dtype = f"model.layers.{layer}.", self.source.dtype()

        def piece(name: str, shape: tuple[int, ...], make) -> Piece:
            return Piece(prefix + name, shape, dtype, lambda: make(layer).to(dtype))

        pieces = [piece(f"self_attn.{name}", shape, make) for name, (shape, make) in made.items()]
        if self.bias_free:
            # folded into what reads it
            pieces.append(piece("input_layernorm.weight", (d,), lambda layer: torch.ones(d)))
        return pieces

    # tensors of one layer, in float32

    def _queries(self, layer: int) -> Tensor:
        """[h(n+r) d]: no content; the rotary part is zero but where the head's key lies."""
        queries = self._folded(layer, "q_proj").unflatten(0, (self.h, self.w))
        return self._placed(layer, queries * self.query_scale)

    def _queries_with_bias(self, layer: int) -> Tensor:
        """[h(n+r) a] over a latent that is the input and a constant, which carries the bias."""
        bias = self.source.bias(layer, "q_proj") / carried(self.a)
        weight = torch.cat((self.source.weight(layer, "q_proj"), bias[:, None]), dim=1)
        weight = torch.nn.functional.pad(weight, (0, self.a - self.d - 1))
        return self._placed(layer, weight.unflatten(0, (self.h, self.w)) * self.query_scale)

    def _placed(self, layer: int, queries: Tensor) -> Tensor:
        """[h w k] to [h(n+r) k], each head behind n zeros in the place of its key head."""
        wide = queries.new_zeros(self.h, self.n + self.r, queries.shape[-1])
        for head, query in enumerate(queries):
            start = self.n + head // (self.h // self.g) * self.w
            wide[head, start : start + self.w] = interleaved(query)
        return wide.flatten(0, 1)

    def _compress(self, layer: int) -> Tensor:
        """[c+r d]: values and the constant's zeros, or the input itself; then the keys."""
        keys = self._folded(layer, "k_proj").unflatten(0, (self.g, self.w))
        keys = torch.cat([interleaved(key) for key in keys])
        if self.bias_free:
            return torch.cat((torch.eye(self.c), keys))
        values = self.source.weight(layer, "v_proj")
        return torch.cat((values, values.new_zeros(self.c - len(values), self.d), keys))

    def _compress_bias(self, layer: int) -> Tensor:
        values, keys = (self.source.bias(layer, name) for name in ("v_proj", "k_proj"))
        latent = _one_hot(self.c, self.g * self.w, self._value_constant(layer))
        latent[: len(values)] = values
        return torch.cat((latent, *(interleaved(key) for key in keys.unflatten(0, (self.g, self.w)))))

    def _latent_norm(self, layer: int) -> Tensor:
        if self.bias_free:
            return torch.ones(self.c)
        norm = undoing_norm(self.c, self._value_constant(layer))
        norm[self.g * self.w] = 0  # nothing behind it reads the constant
        return norm

    def _input_norm(self, layer: int) -> Tensor:
        norm = undoing_norm(self.a, self._input_constant(layer))
        norm[self.d] = carrying_weight(self.a)
        return norm

    def _expand(self, layer: int) -> Tensor:
        """[h(n+v) c]: keys have no content; values are picked from the latent, or computed from the input."""
        expand = torch.zeros(self.h, self.n + self.w, self.c)
        values = self._folded(layer, "v_proj") if self.bias_free else torch.eye(self.g * self.w, self.c)
        for head, part in enumerate(expand):
            part[self.n :] = values.unflatten(0, (self.g, self.w))[head // (self.h // self.g)]
        return expand.flatten(0, 1)

    def _value_constant(self, layer: int) -> float:
        values = self.source.weight(layer, "v_proj") * self.source.input_norm(layer)
        largest = values.norm().item() * math.sqrt(self.d) + self.source.bias(layer, "v_proj").norm().item()
        return self._constant(self.c, largest)

    def _input_constant(self, layer: int) -> float:
        return self._constant(self.a, math.sqrt(self.d) * self.source.input_norm(layer).abs().max().item())

    def _constant(self, width: int, largest: float) -> float:
        """At least CONSTANT_OVER_LATENT times the largest norm, such that no dtype rounds it or its norm's weight."""
        constant = math.sqrt(width) * 2.0 ** math.ceil(math.log2(max(CONSTANT_OVER_LATENT * largest, 1e-3)))
        if constant > torch.finfo(self.source.dtype()).max:
            raise ValueError(
                f"an exact conversion needs a constant of {constant:.3g}, which {self.source.dtype()} does not hold; "
                "load the source in bfloat16 with transformers and save it, or leave the constant out with --bias-free."
            )
        return constant

    def check_dtype(self) -> None:
        """ValueError where the source's dtype does not hold the constant of its first layer."""
        if not self.bias_free:
            self._value_constant(0)

    def _folded(self, layer: int, projection: str) -> Tensor:
        """A projection's weight, with the norm before it where the new one is to be without weights."""
        weight = self.source.weight(layer, projection)
        return weight * self.source.input_norm(layer) if self.bias_free else weight


def frequencies_of(origin: PreTrainedConfig, width: int) -> tuple[Tensor, float]:
    """The frequencies [width/2] of a source's head in float64, as they act, and the factor on cos and sin."""
    theta, kind = origin.rope_parameters["rope_theta"], origin.rope_parameters["rope_type"]
    if kind == "default":
        return theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](origin, "cpu")
    return frequencies.double(), float(factor)


def rope_table(origin: PreTrainedConfig, frequencies: Tensor, factor: float) -> dict:
    """RoPE with any frequencies [r/2] and a factor on cos and sin, as a config says it.

    Those of plain RoPE need nothing new. Others are written as longrope's factors, by which a frequency is divided, the
    same for every length.
    """
    theta, num_pairs = origin.rope_parameters["rope_theta"], len(frequencies)
    plain = theta ** -(torch.arange(num_pairs, dtype=torch.float64) / num_pairs)
    if factor == 1 and torch.equal(frequencies, plain):
        return {"rope_type": "default", "rope_theta": theta}
    factors = (plain / frequencies).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": theta,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": factor,
        "original_max_position_embeddings": origin.max_position_embeddings,
    }


def interleaved(x: Tensor) -> Tensor:
    """Rows [w ..] from halves (i, i + w/2), as Llama turns them, to pairs (2i, 2i + 1), as DeepSeek does."""
    return x.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1)


def _room_for_constant(width: int) -> int:
    """The least even square above `width`: its root is a factor of the constant that no dtype rounds."""
    root = math.isqrt(width) + 1
    return (root + root % 2) ** 2


def _one_hot(width: int, place: int, value: float) -> Tensor:
    x = torch.zeros(width)
    x[place] = value
    return x


def carrying_weight(width: int) -> float:
    """The norm's weight of a constant that carries a bias: a power of two, under which it comes out as about 1."""
    return 2.0 ** -round(math.log2(math.sqrt(width)))


def carried(width: int) -> float:
    """What such a constant is behind a norm over `width` channels, which it dominates."""
    return math.sqrt(width) * carrying_weight(width)


def undoing_norm(width: int, constant: float) -> Tensor:
    """The weight under which a norm over `width` channels, one of them the constant, changes none of the others."""
    return torch.full((width,), math.sqrt(constant**2 / width + LATENT_EPS))
