"""SmolLM2-135M-Instruct keeps its answers as latent attention, as experts, under every cache, and with kernels."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig

from deepseek_latent import LatentCache, PromptCache, optimize_for_inference
from deepseek_latent.commands.__main__ import main
from tests.support import needs_compiler, relative_error

from .conftest import GREEDY, LLAMA, MLA, ROOT, UPCYCLES, nats

pytestmark = pytest.mark.real

STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert type(model).__module__ == "transformers.models.deepseek_v2.modeling_deepseek_v2"
assert not any(name.startswith("deepseek_latent") for name in sys.modules)
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
print(model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :].tolist())
"""
# the largest perplexity under each quantized cache, relative to that of a cache as the model computes
MAX_RATIO = {"int8": 1.01, "int6": 1.01, "int5": 1.02, "int4": 1.04, "fp8": 1.02}
# the largest perplexity with half of the cache, in closed form, relative to that of the source
MAX_RATIO_OF_COMPRESSED = 1.4


def test_logits_are_those_of_the_source_on_real_text(source, model, windows):
    with torch.no_grad():
        assert relative_error(model(windows).logits, source(windows).logits) < 1e-5


def test_greedy_answers_are_those_of_the_source(model, question, answer, tokenizer):
    assert torch.equal(model.generate(question, **GREEDY), answer)
    assert "Monday" in tokenizer.decode(answer[0, question.shape[1] :])


def verified(capsys, folder, against) -> dict:
    capsys.readouterr()
    status = main(["verify", str(folder), "--against", str(against), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert (status, report["problems"]) == (0, [])
    return report


def stock_answer(folder, question) -> list[int]:
    """12 greedy tokens of transformers' own class, in a process that never imports the plugin."""
    ids = ",".join(str(token) for token in question[0].tolist())
    command = [sys.executable, "-c", STOCK, str(folder), ids]
    ended = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    return json.loads(ended.stdout)


def assert_equal_everywhere(capsys, folder, question, answer) -> None:
    """`verify` finds the source's logits and tokens, and transformers' own class gives the same answer."""
    report = verified(capsys, folder, LLAMA)
    assert report["logits_error_against_source"] < 1e-5
    assert report["logits_error_in_transformers"] < 1e-5
    assert report["equal_greedy_tokens"] == "32 of 32"
    num = question.shape[1]
    assert stock_answer(folder, question) == answer[0, num : num + 12].tolist()


def test_the_exact_conversion_is_verified_and_opens_in_stock_transformers(capsys, question, answer):
    assert_equal_everywhere(capsys, MLA, question, answer)


def test_experts_are_verified_and_open_in_stock_transformers(capsys, upcycled, question, answer):
    _, folder = upcycled
    assert_equal_everywhere(capsys, folder, question, answer)


def test_experts_from_latent_attention_are_those_from_the_source(capsys, upcycled, tmp_path):
    scheme, folder = upcycled
    out = tmp_path / "out"
    assert main(["convert", "upcycle", str(MLA), str(out), "--scheme", scheme, *UPCYCLES[scheme]]) == 0
    with safe_open(out / "model.safetensors", "pt") as two, safe_open(folder / "model.safetensors", "pt") as one:
        assert set(one.keys()) == set(two.keys())
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())  # noqa: SIM118
    (out / "model.safetensors").unlink()


def test_the_gguf_file_is_a_source_to_verify_against(capsys):
    pytest.importorskip("gguf")
    report = verified(capsys, MLA, next((ROOT / ".real").glob("*.gguf")))
    assert report["logits_error_against_source"] < 1e-5


@pytest.mark.parametrize("options", [{}, {"max_cache_len": 512}], ids=["growing", "static"])
def test_a_cache_as_the_model_computes_changes_no_token(model, question, answer, options):
    cache = LatentCache(model.config, **options)
    assert torch.equal(model.generate(question, cache=cache, **GREEDY), answer)


@pytest.mark.parametrize("conversion", ["model", "compressed"])
def test_the_perplexity_under_a_quantized_cache_stays_within_its_limit(request, windows, conversion):
    model = request.getfixturevalue(conversion)
    exact = nats(model, windows, LatentCache(model.config))
    for cache_dtype, limit in MAX_RATIO.items():
        quantized = nats(model, windows, LatentCache(model.config, cache_dtype=cache_dtype))
        assert (quantized - exact).mean().exp() < limit, cache_dtype


def test_half_of_the_cache_keeps_most_of_the_quality_without_training(source, compressed, windows):
    assert compressed.config.cached_width == 192
    assert (nats(compressed, windows) - nats(source, windows)).mean().exp() < MAX_RATIO_OF_COMPRESSED


MODES = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "prompt lookup, static": {"prompt_lookup_num_tokens": 3, "cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize("mode", MODES)
def test_a_way_to_generate_changes_no_token(model, question, answer, mode):
    assert torch.equal(model.generate(question, **GREEDY, **MODES[mode])[:, : answer.shape[1]], answer)


def test_its_own_source_can_assist_and_changes_no_token(model, source, question, answer):
    assert torch.equal(model.generate(question, **GREEDY, assistant_model=source)[:, : answer.shape[1]], answer)


def test_beams_are_those_of_the_source(model, source, question):
    options = {"num_beams": 3, "do_sample": False, "max_new_tokens": 12}
    assert torch.equal(model.generate(question, **options), source.generate(question, **options))


def test_padded_prompts_of_a_batch_are_answered_as_alone(model, tokenizer, question, answer):
    rows = torch.cat((torch.full((1, 9), tokenizer.pad_token_id), question), dim=1)
    other = torch.arange(1000, 1000 + rows.shape[1])[None]
    mask = torch.ones(2, rows.shape[1], dtype=torch.long)
    mask[0, :9] = 0
    output = model.generate(torch.cat((rows, other)), attention_mask=mask, **GREEDY)
    num = question.shape[1]
    assert output[0, rows.shape[1] :][: answer.shape[1] - num].tolist() == answer[0, num:].tolist()


def test_requests_over_pages_are_answered_as_alone(model, question, answer):
    prompts = [question[0].tolist(), question[0, :11].tolist(), question[0].tolist()]
    config = GenerationConfig(**GREEDY, eos_token_id=model.generation_config.eos_token_id)
    answers = model.generate_batch(prompts, generation_config=config)
    found = [output.generated_tokens for output in answers.values() if output.prompt_ids == prompts[0]]
    assert found == [answer[0, question.shape[1] :].tolist()] * 2


def test_a_saved_cache_and_a_prompt_cache_continue_with_the_same_tokens(model, question, answer, tmp_path):
    cache = LatentCache(model.config)
    model.generate(question, cache=cache, do_sample=False, max_new_tokens=2)
    cache.save(tmp_path / "cache", tokens=answer, model=model)
    loaded = LatentCache.load(tmp_path / "cache", model=model)
    read = answer[:, : loaded.get_seq_length() + 1]
    assert torch.equal(model.generate(read, cache=loaded, **GREEDY), model.generate(read, cache=cache, **GREEDY))
    prompts = PromptCache(tmp_path / "prompts", max_bytes=10**8)
    long = question.repeat(1, 3)
    first = prompts.load(long, model)
    output = model.generate(long, cache=first, do_sample=False, max_new_tokens=4)
    prompts.store(first, output, model)
    again = prompts.load(long, model)
    assert again.get_seq_length() == long.shape[1] - 1
    assert torch.equal(model.generate(long, cache=again, do_sample=False, max_new_tokens=4), output)


@needs_compiler
def test_kernels_change_no_token(model, question, answer):
    kernels = copy.deepcopy(model)
    optimize_for_inference(kernels)
    assert torch.equal(kernels.generate(question, **GREEDY), answer)


@needs_compiler
def test_int8_weights_still_know_the_capital_of_france(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(MLA)
    optimize_for_inference(model, weights="int8")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, do_sample=False, max_new_tokens=8)[0])


def test_chat_answers_on_the_command_line(capsys):
    command = ["generate", str(MLA), "What is the capital of France?", "--chat", "--max-new-tokens", "30"]
    assert main([*command, "--device", "cpu"]) == 0
    assert "Paris" in capsys.readouterr().out
