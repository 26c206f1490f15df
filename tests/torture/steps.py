"""Caches against lists of token ids: steps of all kinds, some of which fail in the middle, and everything between them.

A case is a sequence of operations on one cache. After each, the cache must hold as many tokens as the lists do; at the
end, and whenever a step succeeds, its logits must be those of one step over all tokens. The model is in float64.
"""

import copy
import functools
import pickle
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM, LatentCache
from deepseek_latent.cache.format import CACHE_DTYPES

from .campaign import PACKAGE, Campaign

NUM_IDS, LAYERS, LARGEST_BATCH, ROOM = 40, 3, 6, 48
# norms and softmax compute in float32, whatever the model's dtype is
LARGEST_ERROR = 1e-4


class Stop(BaseException):
    """Thrown into a step; not an Exception, so that nothing catches it by mistake."""


@functools.cache
def model() -> DeepseekV2ForCausalLM:
    torch.manual_seed(0)
    widths = {"hidden_size": 24, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
    widths |= {"v_head_dim": 12, "intermediate_size": 32, "moe_intermediate_size": 16}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    counts = {"vocab_size": NUM_IDS, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "initializer_range": 0.2}
    counts |= {"bos_token_id": None, "eos_token_id": None}
    config = DeepseekV2Config(**widths, **experts, **counts, topk_method="greedy", max_position_embeddings=128)
    return DeepseekV2ForCausalLM(config).double().eval()


class Sequences:
    """The same cache as lists: for each sequence its ids, and for each id whether later tokens may attend to it."""

    def __init__(self):
        self.ids: list[list[int]] = []
        self.seen: list[list[bool]] = []

    @property
    def length(self) -> int:
        return len(self.ids[0]) if self.ids else 0

    def change(self, function: Callable[[list], list]) -> None:
        self.ids, self.seen = function(self.ids), function(self.seen)

    def logits(self, new: int, cache_dtype: str | None) -> Tensor:
        """The logits of the last `new` tokens, computed in one step; without a `cache_dtype`, no cache is used."""
        t = self.length
        may_see = torch.tensor(self.seen)[:, None] & torch.ones(t, t, dtype=torch.bool).tril()
        cache = None if cache_dtype is None else LatentCache(model().config, cache_dtype=cache_dtype)
        options = {"attention_mask": may_see[:, None], "cache": cache, "use_cache": cache is not None}
        return model()(torch.tensor(self.ids), **options, logits_to_keep=new).logits


class Case:
    """One cache, the lists beside it, and the operations on both."""

    def __init__(self, campaign: Campaign, draw: random.Random, folder: Path):
        self.campaign, self.draw, self.folder = campaign, draw, folder
        config, kind = model().config, draw.choice(["latent", "latent", "static", "dynamic", "stock static"])
        self.cache_dtype = draw.choice(CACHE_DTYPES) if kind in ("latent", "static") else None
        makers = {
            "latent": lambda: LatentCache(config, cache_dtype=self.cache_dtype),
            "static": lambda: LatentCache(config, cache_dtype=self.cache_dtype, max_cache_len=ROOM),
            "dynamic": draw.choice([DynamicCache, lambda: DynamicCache(config=config)]),
            "stock static": lambda: StaticCache(config, max_cache_len=ROOM),
        }
        self.kind, self.make = kind, makers[kind]
        self.cache, self.lists = self.make(), Sequences()
        campaign.count(f"{kind} caches")

    def new_tokens(self) -> tuple[Tensor, Tensor]:
        """Ids [b s] and whether each is a token, not padding; the first tokens may be padded on the left."""
        b = len(self.lists.ids) or self.draw.randint(1, 3)
        s = min(self.draw.choice([1, 1, 1, 2, 3, 7, 12]), ROOM - self.lists.length)
        ids = torch.tensor([[self.draw.randrange(NUM_IDS) for _ in range(s)] for _ in range(b)])
        is_token = torch.ones(b, s, dtype=torch.bool)
        if not self.lists.length and self.draw.random() < 0.4:
            for row in is_token:
                row[: self.draw.randrange(s)] = False
        return ids, is_token

    def masks(self, is_token: Tensor, is_recorded: bool) -> dict[str, Tensor]:
        """A mask of one of the kinds that mean the same: none, 2-D, or 4-D; rows of padding see themselves."""
        before = torch.tensor(self.lists.seen, dtype=torch.bool).view(len(is_token), -1)
        seen = torch.cat((before, is_token), dim=1)
        kind = self.draw.choice(["2-D", "boolean", "additive"] if not seen.all() else ["none", "2-D", "boolean"])
        if kind == "none":
            return {}
        if kind == "2-D":
            return {"attention_mask": seen.long()}
        t = seen.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool).tril()[-is_token.shape[1] :]
        mask = (seen[:, None] & causal)[:, None]
        if self.kind == "stock static" or is_recorded:
            mask = torch.nn.functional.pad(mask, (0, ROOM - t))
        if kind == "additive":
            mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
        return {"attention_mask": mask}

    def step(self, fails: bool = False) -> None:
        if self.lists.length >= ROOM:
            self.reset()
        ids, is_token = self.new_tokens()
        positions = torch.arange(self.lists.length, self.lists.length + ids.shape[1])[None]
        is_recorded = self.kind == "static" and self.lists.length > 0 and self.draw.random() < 0.3
        masks = self.masks(is_token, is_recorded)
        inputs = {"input_ids": ids, "position_ids": positions, "cache": self.cache, **masks}
        recorded = self.cache.count.recorded() if is_recorded else nullcontext()
        if fails:
            with self.draw.choice([self.stopped_by_a_hook, self.stopped_at_a_line])():
                self.campaign.count("steps that failed", 1)
                try:
                    with recorded:
                        model()(**inputs)
                except BaseException:
                    if is_recorded:
                        # as generate() does
                        self.cache.count.undo()
                    raise
                self.campaign.count("steps that failed", -1)
                self.accept(ids, is_token, None)
            return
        with recorded:
            logits = model()(**inputs).logits
        self.accept(ids, is_token, logits)
        self.campaign.count("recorded steps" if is_recorded else "steps")

    def accept(self, ids: Tensor, is_token: Tensor, logits: Tensor | None) -> None:
        if not self.lists.ids:
            self.lists.ids, self.lists.seen = [[] for _ in ids], [[] for _ in ids]
        for row, seen, new, tokens in zip(self.lists.ids, self.lists.seen, ids.tolist(), is_token.tolist()):
            row += new
            seen += tokens
        if logits is not None:
            expected = self.lists.logits(ids.shape[1], self.cache_dtype)
            error = (logits - expected)[is_token].abs().max().item()
            if not error <= LARGEST_ERROR:
                self.campaign.finding("wrong answer", f"{self.kind} {self.cache_dtype}: logits differ by {error:.3g}")

    @contextmanager
    def stopped_by_a_hook(self) -> Iterator[None]:
        """A hook of a module throws before or after it; or never, if the module computes nothing here."""
        module = self.draw.choice([*model().modules()])

        def stop(*seen):
            raise Stop

        register = self.draw.choice([module.register_forward_hook, module.register_forward_pre_hook])
        hook = register(stop)
        try:
            yield
        except Stop:
            pass
        finally:
            hook.remove()

    @contextmanager
    def stopped_at_a_line(self) -> Iterator[None]:
        """An interrupt arrives at a line of our code, as Ctrl-C does; it may also come too late."""
        left = self.draw.randrange(1, 900)

        def trace(frame, event, argument):
            nonlocal left
            if str(PACKAGE) not in frame.f_code.co_filename:
                return None
            left -= event == "line"
            if left == 0 and event == "line":
                left = -1
                raise KeyboardInterrupt
            return trace

        try:
            sys.settrace(trace)
            yield
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)

    def failing_step(self) -> None:
        self.step(fails=True)

    def refused_step(self) -> None:
        """A step with inputs that do not fit is refused in one sentence."""
        b, t = len(self.lists.ids) or 2, self.lists.length
        ids = torch.zeros(b, 2, dtype=torch.long)
        wrong = {
            "mask": {"input_ids": ids, "attention_mask": torch.ones(b, 1, 2, t + 1 + ROOM, dtype=torch.bool)},
            "mask of integers": {"input_ids": ids, "attention_mask": torch.ones(b, 1, 2, t + 2, dtype=torch.long)},
            "2-D mask": {"input_ids": ids, "attention_mask": torch.ones(b + 1, t + 2)},
            "ids": {"input_ids": ids + NUM_IDS},
            "no tokens": {"input_ids": ids[:, :0]},
            "floats": {"input_ids": ids.double()},
            "positions": {"input_ids": ids, "position_ids": torch.zeros(b, 3, dtype=torch.long)},
            "labels": {"input_ids": ids[:, :1], "labels": ids},
        }
        name, inputs = self.draw.choice([*wrong.items()])
        with self.campaign.judged(f"wrong {name}"):
            model()(**inputs, cache=self.cache)
            self.campaign.finding("wrong answer", f"accepted wrong {name}")

    def crop(self) -> None:
        if not isinstance(self.cache, LatentCache) and self.kind != "dynamic":
            return
        count = self.draw.randint(0, self.lists.length)
        self.cache.crop(-count)
        self.lists.change(lambda rows: [row[: len(row) - count] for row in rows])

    def select(self) -> None:
        if self.kind == "stock static" or not self.lists.length:
            return
        b = len(self.lists.ids)
        # beams keep their number; the other operation may change it
        is_reorder = self.draw.random() < 0.5
        chosen = [self.draw.randrange(b) for _ in range(b if is_reorder else self.draw.randint(1, LARGEST_BATCH))]
        (self.cache.reorder_cache if is_reorder else self.cache.batch_select_indices)(torch.tensor(chosen))
        self.lists.change(lambda rows: [list(rows[i]) for i in chosen])

    def repeat(self) -> None:
        repeats = self.draw.randint(1, 3)
        if self.kind == "stock static" or not self.lists.length or len(self.lists.ids) * repeats > LARGEST_BATCH:
            return
        self.cache.batch_repeat_interleave(repeats)
        self.lists.change(lambda rows: [list(row) for row in rows for _ in range(repeats)])

    def reset(self) -> None:
        self.cache.reset() if isinstance(self.cache, LatentCache) and self.kind != "static" else self.renew()
        self.lists = Sequences()

    def renew(self) -> None:
        self.cache = self.make()

    def copy(self) -> None:
        through_bytes = self.draw.random() < 0.5
        self.cache = pickle.loads(pickle.dumps(self.cache)) if through_bytes else copy.deepcopy(self.cache)

    def save_and_load(self) -> None:
        if self.kind != "latent" or not self.lists.length:
            return
        path = self.folder / "cache.safetensors"
        self.cache.save(path, tokens=torch.tensor(self.lists.ids), model=model())
        self.cache = LatentCache.load(path, model=model())
        if self.cache.stored_tokens.tolist() != self.lists.ids:
            self.campaign.finding("wrong answer", "stored_tokens are not the ids of the cache")

    def offload(self) -> None:
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()

    def check(self) -> None:
        """The cheap checks, after every operation."""
        lengths = {int(layer.get_seq_length()) for layer in self.cache.layers} or {0}
        if lengths != {self.lists.length}:
            self.campaign.finding("wrong answer", f"{self.kind}: layers hold {lengths}, lists {self.lists.length}")


OPERATIONS = {
    Case.step: 8,
    Case.failing_step: 6,
    Case.refused_step: 2,
    Case.crop: 2,
    Case.select: 2,
    Case.repeat: 1,
    Case.reset: 1,
    Case.copy: 1,
    Case.save_and_load: 1,
    Case.offload: 1,
}


@torch.no_grad()
def run(campaign: Campaign) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for draw in campaign.cases():
            case = Case(campaign, draw, Path(folder))
            drawn = draw.choices([*OPERATIONS], OPERATIONS.values(), k=draw.randint(2, 10))
            for operation in (Case.step, *drawn, Case.step):
                try:
                    operation(case)
                except Exception as error:
                    campaign.finding("raw exception", f"{operation.__name__}: {type(error).__name__}: {error}"[:300])
                    break
                case.check()
                campaign.count(operation.__name__.replace("_", " "))
