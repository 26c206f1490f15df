"""Continuous batching: many requests in one row and in pages get the tokens that each request gets alone."""

import gc
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState
from transformers.generation.continuous_batching.cache import PagedAttentionMemoryHandler

from tests.cache.batching import (
    NEW_TOKENS,
    VARIANTS,
    alone,
    batched,
    batching,
    generation,
    prompts_of,
    result_of,
    running,
    tokens_alone,
)
from tests.support import random_ids, tiny_model

PYDOC = Path(__file__).parents[2] / "examples" / "pydoc-tiny"
IMPLEMENTATIONS = ["sdpa", "eager", "paged|eager"]


@pytest.fixture(scope="module", autouse=True)
def _garbage_of_this_file_only():
    """Excludes imported objects from the garbage collections that transformers starts, which saves time."""
    gc.freeze()
    yield
    gc.unfreeze()


def rows_through(model) -> list[int]:
    """Returns a list to which every later forward pass appends its number of tokens."""
    lengths = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    return lengths


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_each_request_alone(variant, implementation):
    model, prompts, expected = tiny_model(**VARIANTS[variant]), prompts_of(), tokens_alone(variant)
    model.set_attn_implementation(implementation)
    assert batched(model, prompts, continuous_batching_config=batching()) == expected
    assert model.config._attn_implementation == implementation
    # a plain forward pass afterwards gives the same tokens
    model.set_attn_implementation(implementation.removeprefix("paged|"))
    assert alone(model, prompts[:1]) == expected[:1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_prompt_longer_than_a_batch_is_read_in_chunks(implementation):
    model = tiny_model()
    rows = rows_through(model)
    model.set_attn_implementation(implementation)
    assert batched(model, prompts_of(), continuous_batching_config=batching(max_batch_tokens=20)) == tokens_alone()
    assert max(rows) == 20


@pytest.mark.parametrize("allow_block_sharing", [True, False], ids=["shared", "unshared"])
def test_requests_evicted_for_lack_of_pages_give_the_same_tokens(allow_block_sharing, monkeypatch):
    evicted = []
    restart = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState, "create_equivalent_initial_request", lambda self: evicted.append(self) or restart(self)
    )
    few = batching(num_blocks=10, allow_block_sharing=allow_block_sharing)
    assert batched(tiny_model(), prompts_of(), continuous_batching_config=few) == tokens_alone()
    assert evicted


def test_a_request_that_arrives_while_others_decode_changes_neither():
    model, prompts = tiny_model(), prompts_of((17, 40, 5))
    config = generation(max_new_tokens=24)
    expected = alone(model, prompts, config)
    with running(model, config) as manager:
        early = manager.add_request(prompts[0], streaming=True)
        for _ in range(3):
            manager.get_result(early, timeout=20)
        late = [manager.add_request(prompt) for prompt in prompts[1:]]
        finished = {}
        while len(finished) < 3:
            output = manager.get_result(timeout=20)
            if output.is_finished():
                finished[output.request_id] = output.generated_tokens
    assert [finished[request] for request in (early, *late)] == expected


def test_a_shared_prefix_is_read_and_not_computed_again():
    model, prefix = tiny_model(), random_ids(1, 40, seed=3)[0].tolist()
    prompts = [prefix + tail for tail in prompts_of((9, 2, 16))]
    expected, rows = alone(model, prompts), rows_through(model)
    with running(model, max_batch_tokens=64) as manager:
        for prompt, tokens, known in zip(prompts, expected, (0, 40, 40)):
            rows.clear()
            assert result_of(manager, manager.add_request(prompt)) == tokens
            assert rows[0] == len(prompt) - known


def test_a_request_ends_with_eos_and_the_others_continue():
    eos = tokens_alone()[0][4]
    expected = [tokens[: tokens.index(eos) + 1] if eos in tokens else tokens for tokens in tokens_alone()]
    assert len({len(tokens) for tokens in expected}) > 1
    config = generation(eos_token_id=eos)
    assert batched(tiny_model(), prompts_of(), config, continuous_batching_config=batching()) == expected


def test_a_seed_makes_sampling_repeatable():
    model, prompts = tiny_model(), prompts_of()
    config = generation(do_sample=True)
    first, again, other = (
        batched(model, prompts, config, continuous_batching_config=batching(seed=seed)) for seed in (5, 5, 6)
    )
    assert first == again != other


def test_sampled_tokens_have_the_probabilities_of_the_model():
    """The returned log-probabilities are those of a plain forward pass over the whole sequence."""
    model, prompts = tiny_model(), prompts_of()
    outputs = model.generate_batch(
        prompts,
        generation_config=generation(do_sample=True),
        continuous_batching_config=batching(seed=1, return_logprobs=True),
    )
    for prompt, output in zip(prompts, outputs.values()):
        tokens = torch.tensor([prompt + output.generated_tokens])
        with torch.no_grad():
            every = model(tokens).logits[0].log_softmax(-1)
        expected = every[len(prompt) - 1 : -1].gather(1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=0, atol=1e-4)


def test_several_sequences_sampled_from_one_prompt_differ():
    model, prompt = tiny_model(), prompts_of((21,))[0]
    config = generation(do_sample=True, num_return_sequences=3)
    with running(model, config, return_logprobs=True, seed=2) as manager:
        manager.add_request(prompt)
        outputs = [manager.get_result(timeout=20) for _ in range(3)]
    assert len({tuple(output.generated_tokens) for output in outputs}) == 3
    for output in outputs:
        tokens = torch.tensor([prompt + output.generated_tokens])
        with torch.no_grad():
            every = model(tokens).logits[0].log_softmax(-1)
        expected = every[len(prompt) - 1 : -1].gather(1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(output.logprobs), expected, rtol=0, atol=1e-4)


def test_generate_accepts_the_paged_cache():
    model, (prompt,) = tiny_model(), prompts_of((20,))
    output = model.generate(
        torch.tensor([prompt]),
        generation_config=generation(),
        cache_implementation="paged",
        continuous_batching_config=batching(),
    )
    assert output[0, 0, 20:].tolist() == alone(model, [prompt])[0]


def test_a_manager_kept_for_the_next_session_serves_it():
    model, ways_to_start = tiny_model(), set()
    for _ in range(3):
        kept = {"persistent_manager": True, "continuous_batching_config": batching()}
        assert batched(model, prompts_of(), **kept) == tokens_alone()
        ways_to_start.add(model.init_continuous_batching()._create_batch_processor)
    assert len(ways_to_start) == 1
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_adapters_on_every_projection_act(kind, implementation):
    model, prompts = tiny_model(), prompts_of((3, 17, 40))
    bare = alone(model, prompts)
    targets = ["kv_b_proj"] if kind == "dora" else ["kv_b_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
    config = peft.LoraConfig(
        target_modules=targets, r=4, lora_alpha=16, init_lora_weights=False, use_dora=kind == "dora"
    )
    model = peft.get_peft_model(model, config).eval()
    # only calling the module has the effect of DoRA, whatever its weights are
    assert (model.base_model.model.model.layers[0].self_attn.up_projections() is None) == (kind == "dora")
    expected = alone(model, prompts)
    assert expected != bare
    model.base_model.model.set_attn_implementation(implementation)
    assert batched(model, prompts, continuous_batching_config=batching()) == expected


def test_decoding_absorbs(monkeypatch):
    from deepseek_latent.attention import attention as latent_attention

    calls = []
    for name in ("absorbed_attention", "expanded_attention"):
        original = getattr(latent_attention, name)
        monkeypatch.setattr(
            latent_attention,
            name,
            lambda q, *a, name=name, original=original, **k: calls.append((name, q.shape[1])) or original(q, *a, **k),
        )
    model, prompts = tiny_model(), prompts_of((9, 17, 40))
    batched(model, prompts, continuous_batching_config=batching(max_batch_tokens=80))
    assert {name for name, s in calls if s == 1} == {"absorbed_attention"}
    assert {name for name, s in calls if s in (9, 17, 40)} == {"expanded_attention"}
    # requests of 17 and 9 tokens decode in one call, and the request of 40 in another
    assert len([s for _, s in calls if s == 1]) < 3 * model.config.num_hidden_layers * (NEW_TOKENS - 1)


def held_bytes(pages) -> int:
    """Bytes of every tensor that the page cache holds."""
    held = {}
    for value in vars(pages).values():
        for x in value if isinstance(value, list) else [value]:
            if isinstance(x, torch.Tensor):
                held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(held.values())


@pytest.mark.parametrize("kv_lora_rank", [40, 41])
def test_pages_hold_each_latent_and_rotary_key_once(kv_lora_rank):
    model = tiny_model(kv_lora_rank=kv_lora_rank)
    pages = {}
    for num_blocks in (20, 52):
        with running(model, num_blocks=num_blocks) as manager:
            result_of(manager, manager.add_request([5, 6, 7]))
            pages[num_blocks] = held_bytes(manager.batch_processor.cache)
    c, r, layers = kv_lora_rank, model.config.qk_rope_head_dim, model.config.num_hidden_layers
    # both halves of a row have the same width, so an odd c + r leaves one element unused
    per_token = layers * (c + r + c % 2) * 4
    assert pages[52] - pages[20] == 32 * 8 * per_token
    # transformers keeps two blocks for padding tokens, and aligns sizes
    assert pages[20] <= (20 + 4) * 8 * per_token


def test_the_number_of_pages_follows_from_the_available_memory(monkeypatch):
    """A cached token takes c + r elements per layer, as many again to read one layer, and an index, but no mask."""
    model, num_blocks = tiny_model(), {}
    for megabytes in (8, 24):
        monkeypatch.setattr(PagedAttentionMemoryHandler, "get_available_memory", lambda self, n=megabytes: n << 20)
        with running(model, num_blocks=None, max_batch_tokens=64) as manager:
            result_of(manager, manager.add_request([5, 6, 7]))
            num_blocks[megabytes] = manager.batch_processor.cache.num_blocks
    cached, layers = model.config.cached_width * 4, model.config.num_hidden_layers
    per_token = layers * cached + cached + 8
    assert num_blocks[24] - num_blocks[8] == pytest.approx((16 << 20) / (8 * per_token), abs=1)


def test_config_head_dim_stays_the_rotary_width():
    model = tiny_model()
    with running(model) as manager:
        result_of(manager, manager.add_request([5, 6, 7]))
        assert manager.batch_processor.cache.config.head_dim == 24
        assert model.config.head_dim == model.config.qk_rope_head_dim == 8
        assert model.config.num_key_value_heads == 3
        assert manager.model is model


def test_another_model_in_the_process_keeps_its_own_pages():
    torch.manual_seed(0)
    config = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=4, num_key_value_heads=2)).eval()
    model, prompts = tiny_model(), prompts_of((5, 12))
    expected = alone(llama, prompts), alone(model, prompts)
    with running(llama) as first, running(model) as second:
        requests = [[manager.add_request(prompt) for prompt in prompts] for manager in (first, second)]
        for manager, ids, tokens in zip((first, second), requests, expected):
            outputs = [manager.get_result(timeout=20) for _ in ids]
            assert {output.request_id: output.generated_tokens for output in outputs} == dict(zip(ids, tokens))
        assert first.batch_processor.cache.config is llama.config


def test_a_trained_checkpoint_generates_in_bfloat16_what_it_does_in_float32():
    """Every token is the most likely one of a float32 run over the same sequence, or within bfloat16's rounding."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(PYDOC).eval(), AutoTokenizer.from_pretrained(PYDOC)
    assert model.dtype == torch.bfloat16
    texts = ["Return the", "def __init__(self, name):\n    ", "Raises ValueError if", "x", "The file is opened in"]
    prompts = [tokenizer(text).input_ids for text in texts]
    tokens = batched(model, prompts, generation(max_new_tokens=30), continuous_batching_config=batching())
    model = model.float()
    for prompt, new in zip(prompts, tokens):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + new])).logits[0, len(prompt) - 1 : -1]
        missing = logits.amax(-1) - logits.gather(1, torch.tensor(new)[:, None])[:, 0]
        assert missing.max() < 0.25
        assert (missing == 0).float().mean() > 0.9


def test_a_manager_made_without_the_model_is_refused_in_one_sentence():
    model = tiny_model()
    manager = ContinuousBatchingManager(model, generation(), batching())
    manager.start()
    manager.add_request([5, 6, 7])
    output = manager.get_result(timeout=20)
    manager.stop(block=True, timeout=10)
    assert output.error.startswith("continuous batching needs pages made for latents, 1 head of width 24, got 3 of")


@pytest.mark.parametrize("option", [{"use_cuda_graph": True}, {"max_blocks_per_request": 4}], ids=str)
def test_options_that_latents_do_not_support_are_refused_before_anything_starts(option):
    with pytest.raises(ValueError, match="leave use_cuda_graph and max_blocks_per_request unset"):
        tiny_model().generate_batch(
            [[5, 6]], generation_config=generation(), continuous_batching_config=batching(**option)
        )


def test_a_plain_forward_pass_with_a_paged_implementation_is_refused():
    model, ids = tiny_model(), random_ids(1, 5)
    model.set_attn_implementation("paged|eager")
    for forward in (model, model.generate):
        with pytest.raises(ValueError, match=r"'paged\|eager' is for continuous batching .*_implementation\('eager'\)"):
            forward(ids)


def test_latents_of_another_dtype_than_the_pages_are_refused_in_one_sentence():
    model = tiny_model(dtype=torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.kv_a_layernorm.float()
        layer.self_attn.kv_a_layernorm.register_forward_pre_hook(lambda module, args: args[0].float())
    with running(model) as manager:
        manager.add_request([5, 6, 7])
        output = manager.get_result(timeout=20)
    assert output.error == (
        "the pages hold torch.bfloat16, the new latents are torch.float32; load the model in one dtype."
    )
