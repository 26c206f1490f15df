"""With adapters on every module that `lora_config` reaches, each way to generate gives the merged model's tokens."""

import contextlib
import copy
import functools
import gc

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from deepseek_latent import lora_config
from tests.support import LITE, V2, needs_compiler, random_ids, relative_error, tiny_model

PROMPT, NEW = 11, 5
IDS = random_ids(3, PROMPT)
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# a dense layer and one with experts
VARIANTS = {"V2": V2 | {"num_hidden_layers": 2}, "Lite": LITE | {"num_hidden_layers": 2}}
# peft supports only LoRA, of these kinds, for parameters such as the stacked weights of routed experts
ON_EXPERTS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}}
KINDS = ON_EXPERTS | {
    "DoRA": {"use_dora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@pytest.fixture(autouse=True)
def _nothing_compiled_before():
    torch.compiler.reset()
    counters.clear()


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_this_file_only():
    """Excludes imported objects from the garbage collections of continuous batching, which saves time."""
    gc.freeze()
    yield
    gc.unfreeze()


def base(variant: str):
    return tiny_model(**VARIANTS[variant])


def adapted(variant: str, kind: str = "LoRA", *, adapters=("first",), trained: bool = True, **options) -> PeftModel:
    """A model with adapters as peft initializes them or, if `trained`, with noise on all trainable parameters."""
    model = base(variant)
    config = lora_config(model, r=9, **{"routed_experts": kind in ON_EXPERTS} | KINDS[kind] | options)
    model = get_peft_model(model, config, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, copy.deepcopy(config))
    for parameter in adapter_parameters(model).values() if trained else ():
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def adapter_parameters(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def merged(model: PeftModel):
    return copy.deepcopy(model).merge_and_unload()


def plain(**options):
    """Returns new tokens [b NEW] and the logits [b NEW vocab] that they were chosen by."""

    def generate(model, ids: Tensor = IDS, **more):
        wanted = {"return_dict_in_generate": True, "output_logits": True}
        output = model.generate(input_ids=ids, **GREEDY, **wanted, **options, **more)
        return output.sequences[:, ids.shape[1] :].tolist(), torch.stack(output.logits, dim=1)

    return generate


def compiled(backend: str = "eager", fullgraph: bool = True):
    compile_config = CompileConfig(backend=backend, mode=None, fullgraph=fullgraph)
    compile_config._compile_all_devices = True
    return plain(cache_implementation="static", compile_config=compile_config)


def continuous_batching(model):
    outputs = model.generate_batch(
        IDS.tolist(),
        generation_config=GenerationConfig(**GREEDY | {"eos_token_id": -1}),
        # the prompts are read in chunks
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=16),
    )
    assert [output.error for output in outputs.values()] == [None] * len(IDS)
    return [output.generated_tokens for output in outputs.values()], None


WITHOUT_CACHE = plain(use_cache=False)
WAYS = {
    "no cache": WITHOUT_CACHE,
    "default": plain(),
    "chunked prefill": plain(prefill_chunk_size=4),
    "static": plain(cache_implementation="static"),
    "int8": plain(cache_implementation="quantized", cache_config={"backend": "latent", "cache_dtype": "int8"}),
    "continuous batching": continuous_batching,
    "compiled": compiled(),
    "compiled in pieces": compiled(fullgraph=False),
    "inductor": compiled("inductor"),
    "beams": plain(num_beams=3),
}


def cell(way: str, kind: str, variant: str):
    # peft's DoRA breaks the graph of any model, and compiling the parts is slow; both variants compile alike
    if way == "compiled" and kind == "DoRA":
        way = "compiled in pieces"
    is_slow = way == "compiled in pieces" or (way, variant) == ("compiled", "Lite")
    return pytest.param(way, kind, variant, marks=[pytest.mark.slow] if is_slow else [])


CELLS = [cell(way, kind, variant) for way in list(WAYS)[:7] for kind in KINDS for variant in VARIANTS]
CELLS += [pytest.param("inductor", "LoRA", "V2", marks=[pytest.mark.slow, needs_compiler])]


@functools.cache
def subject(variant: str, kind: str) -> tuple[PeftModel, tuple, tuple]:
    """A model with an adapter, its output when merged, and its output without the adapter; tests do not change it."""
    torch.manual_seed(3)
    model = adapted(variant, kind)
    return model, WITHOUT_CACHE(merged(model)), WITHOUT_CACHE(base(variant))


def fit_for(way: str, model: PeftModel) -> PeftModel:
    """For int8, the model in float64, where the order of a sum hardly ever decides between two codes."""
    if way == "int8":
        model = copy.deepcopy(model).double()
        # torch has no grouped_mm for float64
        model.base_model.model.set_experts_implementation("eager")
    return model


def expected_of(way: str, *inputs) -> tuple:
    """The expected output; only quantization and beams change it."""
    return (WAYS[way] if way in ("int8", "beams") else WITHOUT_CACHE)(*inputs)


def assert_same(actual, expected) -> None:
    assert actual[0] == expected[0]
    if actual[1] is not None:
        assert relative_error(actual[1], expected[1]) < 1e-5


@pytest.mark.parametrize(("way", "kind", "variant"), CELLS)
def test_every_way_gives_the_output_of_the_merged_model(way, kind, variant):
    model, expected, without = subject(variant, kind)
    assert expected[0] != without[0]
    assert relative_error(expected[1], without[1]) > 1e-1
    if way == "int8":
        model = fit_for(way, model)
        expected = WAYS[way](merged(model))
    assert_same(WAYS[way](model), expected)
    assert bool(counters["stats"]["unique_graphs"]) == (way in ("compiled", "compiled in pieces", "inductor"))


@each_variant
@each_kind
def test_all_but_dora_are_absorbed(kind, variant):
    model, _, _ = subject(variant, kind)
    with torch.no_grad():
        readable = [layer.self_attn.up_projections() is not None for layer in model.base_model.model.model.layers]
    assert readable == [kind != "DoRA"] * 2


@each_variant
@each_kind
def test_an_adapter_as_peft_initializes_it_does_not_change_the_output(kind, variant):
    model, (_, _, expected) = adapted(variant, kind, trained=False), subject(variant, kind)
    assert_same(WAYS["default"](model), expected)
    # these two subtract the initial adapter from the weight
    weights = [m.model.layers[1].self_attn.kv_b_proj for m in (model.base_model.model, base(variant))]
    moved = relative_error(weights[0].base_layer.weight, weights[1].weight) > 1e-2
    assert moved == (kind in ("PiSSA", "OLoRA"))


@each_variant
@each_kind
def test_every_factor_gets_a_gradient(kind, variant):
    model, ids = adapted(variant, kind).train(), random_ids(3, 30)
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    for name, parameter in adapter_parameters(model).items():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 1e-6, name
    assert relative_error(output.logits, merged(model)(ids).logits) < 1e-5


PROJECTIONS = {
    "V2": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
    "Lite": ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"],
}
MLPS = [f"{mlp}.{name}_proj" for mlp in ("layers.0.mlp", "shared_experts") for name in ("gate", "up", "down")]
# peft wraps the two parameters of experts in one another
MLPS += ["mlp.experts", "mlp.experts.base_layer"]


@pytest.mark.parametrize(
    ("variant", "projection"), [(variant, name) for variant in VARIANTS for name in PROJECTIONS[variant] + MLPS]
)
@torch.no_grad()
def test_removing_an_adapter_from_one_projection_changes_the_next_token(variant, projection):
    model = adapted(variant)
    cache = model(IDS[:, :-1], use_cache=True).cache

    def decoded(model) -> Tensor:
        return model(IDS[:, -1:], cache=copy.deepcopy(cache)).logits

    before = decoded(model)
    taken = [x for name, x in adapter_parameters(model).items() if f".{projection}.lora_B." in name]
    assert len(taken) == (2 if projection in PROJECTIONS[variant] else 1)
    for parameter in taken:
        parameter.zero_()
    assert relative_error(decoded(model), before) > 1e-3
    assert relative_error(decoded(model), decoded(merged(model))) < 1e-5


def step(model: PeftModel) -> None:
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=1.0)
    with torch.enable_grad():
        model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


# both variants have the same compiled step, except for the queries
SEVERAL = [(way, variant) for way in ("default", "static", "int8") for variant in VARIANTS]
SEVERAL += [pytest.param("compiled", "V2", marks=pytest.mark.slow)]
EVENTS = {
    "the second": lambda model: model.set_adapter("second"),
    "both": lambda model: model.base_model.set_adapter(["first", "second"]),
    "none": lambda model: model.base_model.disable_adapter_layers(),
    "the first": lambda model: (model.base_model.enable_adapter_layers(), model.set_adapter("first")),
    "the first, a step on": step,
}


@pytest.mark.parametrize(("way", "variant"), SEVERAL)
def test_a_change_between_two_generations_takes_effect_at_once(way, variant):
    model = fit_for(way, adapted(variant, adapters=("first", "second")))
    output = WAYS[way](model)
    for event, happens in EVENTS.items():
        happens(model)
        before, output = output, WAYS[way](model)
        assert relative_error(output[1], before[1]) > 1e-2, event
        # peft also merges adapters that are disabled
        alone = copy.deepcopy(model).unload() if event == "none" else merged(model)
        assert_same(output, expected_of(way, alone))


@pytest.mark.parametrize(("way", "variant"), [*SEVERAL, ("chunked prefill", "V2"), ("beams", "V2")])
def test_each_row_of_a_mixed_batch_has_its_adapter(way, variant):
    names = ["second", "__base__", "first"]
    model = fit_for(way, adapted(variant, adapters=("first", "second"), routed_experts=False))
    tokens, logits = WAYS[way](model, adapter_names=names)
    # the beams of a row are consecutive
    logits = logits.unflatten(0, (len(names), -1))
    for row, name in enumerate(names):
        is_base = name == "__base__"
        model.set_adapter("first" if is_base else name)
        with model.disable_adapter() if is_base else contextlib.nullcontext():
            assert_same(([tokens[row]], logits[row]), expected_of(way, model, IDS[row : row + 1]))


def test_peft_refuses_a_mixed_batch_with_adapters_on_routed_experts():
    model = adapted("V2", adapters=("first", "second"))
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        WAYS["default"](model, adapter_names=["first", "second", "__base__"])
