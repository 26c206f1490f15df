"""`deepseek-latent generate` streams the text of the model and shows the cache that was held."""

import json
import re
import shutil
from io import StringIO

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, TextStreamer
from transformers.utils import logging

import deepseek_latent
from deepseek_latent import DeepseekV2Config
from deepseek_latent.commands.__main__ import main
from tests.commands.terminal import NUM_IDS, assert_refused, byte_tokenizer, printed, row
from tests.conversion.sources import convert_to_mla, save_source
from tests.support import V2, needs_compiler, tiny_model


def reference_text(folder, prompt: str, num_tokens: int) -> str:
    tokenizer = byte_tokenizer()
    model = deepseek_latent.DeepseekV2ForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(inputs["input_ids"], max_new_tokens=num_tokens, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_generate_streams_exactly_the_models_greedy_text(folder, capsys):
    expected = reference_text(folder, "latent", 9)
    capsys.readouterr()
    status, out, _ = printed(capsys, "generate", folder, "latent", "--max-new-tokens", 9, "--device", "cpu")
    assert status == 0
    assert out == "latent" + expected + "\n"


@needs_compiler
def test_generate_decodes_with_operators_where_asked(folder, capsys):
    expected = reference_text(folder, "latent", 9)
    capsys.readouterr()
    options = ("--max-new-tokens", 9, "--device", "cpu", "--optimize")
    _, out, err = printed(capsys, "generate", folder, "latent", *options)
    assert out == "latent" + expected + "\n"
    assert "Optimized(" in err


def test_generate_names_unreadable_weights_in_one_sentence(folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    status, _, err = printed(capsys, "generate", broken, "latent")
    assert status == 2
    assert f"expected readable weights in {broken}" in err
    assert len(err.splitlines()) == 1


def test_generate_shows_the_size_of_the_cache_that_was_held(folder, capsys):
    _, _, err = printed(capsys, "generate", folder, "latent", "--max-new-tokens", 9, "--device", "cpu")
    # six bytes of prompt; the ninth token is not fed back
    tokens = 6 + 9 - 1
    held = tokens * V2["num_hidden_layers"] * (V2["kv_lora_rank"] + V2["qk_rope_head_dim"]) * 4
    head = V2["qk_nope_head_dim"] + V2["qk_rope_head_dim"] + V2["v_head_dim"]
    expanded = tokens * V2["num_hidden_layers"] * V2["num_attention_heads"] * head * 4
    assert row(err, "new tokens") == ["9"]
    assert row(err, "cache held") == [f"{held:,} bytes"]
    assert row(err, "as keys and values") == [f"{expanded:,} bytes"]
    assert row(err, "ratio") == [f"{expanded / held:.1f}"]
    assert re.fullmatch(r"\d+\.\d tokens/s", *row(err, "decoding"))
    assert re.fullmatch(r"\d+\.\d{3} s", *row(err, "time to first token"))


def test_generate_compares_the_cache_of_a_converted_model_with_that_of_its_source(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig, vocab_size=NUM_IDS, num_key_value_heads=2, eos_token_id=None)
    out = convert_to_mla(tmp_path / "source", tmp_path / "out")
    byte_tokenizer().save_pretrained(out)
    config = DeepseekV2Config.from_pretrained(out)
    source = LlamaConfig.from_pretrained(tmp_path / "source")
    assert config.source_cached_width == 2 * 2 * source.head_dim
    capsys.readouterr()
    _, _, err = printed(capsys, "generate", out, "latent", "--max-new-tokens", 9, "--device", "cpu")
    held, before = ((6 + 9 - 1) * 3 * width * 4 for width in (config.cached_width, config.source_cached_width))
    assert row(err, "cache held") == [f"{held:,} bytes"]
    assert row(err, "as keys and values, source, before the conversion") == [f"{before:,} bytes"]
    assert row(err, "ratio to source") == [f"{before / held:.2f}"]


def test_generate_compares_the_cache_with_gqa_of_eight_groups(tmp_path, capsys):
    tiny_model(vocab_size=NUM_IDS, eos_token_id=None, num_attention_heads=16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    _, _, err = printed(capsys, "generate", tmp_path, "latent", "--max-new-tokens", 9, "--device", "cpu")
    elements = 8 * (V2["qk_nope_head_dim"] + V2["v_head_dim"]) * V2["num_hidden_layers"]
    assert row(err, "as keys and values, GQA, 8 groups") == [f"{(6 + 9 - 1) * elements * 4:,} bytes"]
    assert row(err, "as keys and values of all 16 heads")


@pytest.mark.parametrize(("cache_dtype", "row_bytes"), [("int8", 58), ("int6", 50), ("int4", 38), ("fp8", 60)])
def test_generate_holds_the_cache_in_the_given_cache_dtype(folder, capsys, cache_dtype, row_bytes):
    _, _, err = printed(
        capsys, "generate", folder, "latent", "--max-new-tokens", 9, "--device", "cpu", "--cache-dtype", cache_dtype
    )
    assert row(err, "cache held") == [f"{(6 + 9 - 1) * V2['num_hidden_layers'] * row_bytes:,} bytes"]


def test_generate_halves_the_cache_in_bfloat16(folder, capsys):
    sizes = []
    for dtype in ("float32", "bfloat16"):
        _, _, err = printed(capsys, "generate", folder, "x", "--max-new-tokens", 2, "--dtype", dtype, "--device", "cpu")
        sizes.append(int(row(err, "cache held")[0].removesuffix(" bytes").replace(",", "")))
    assert sizes[0] == 2 * sizes[1]


def test_one_token_has_no_decoding_speed(folder, capsys):
    status, _, err = printed(capsys, "generate", folder, "x", "--max-new-tokens", 1, "--device", "cpu")
    assert status == 0
    assert "tokens/s" not in err


def test_seeded_sampling_repeats_itself_and_differs_from_greedy(folder, capsys):
    def text(*options):
        return printed(capsys, "generate", folder, "x", "--max-new-tokens", 12, "--device", "cpu", *options)[1]

    sampled = text("--temperature", 5, "--top-p", 0.99, "--seed", 3)
    assert sampled == text("--temperature", 5, "--top-p", 0.99, "--seed", 3)
    assert sampled != text("--temperature", 5, "--top-p", 0.99, "--seed", 4)
    assert sampled != text()


def test_temperature_zero_and_a_tiny_top_p_are_greedy(folder, capsys):
    def text(*options):
        return printed(capsys, "generate", folder, "x", "--max-new-tokens", 6, "--device", "cpu", *options)[1]

    assert text("--temperature", 0) == text()
    assert text("--temperature", 5, "--top-p", 1e-6) == text()


def test_sampling_is_not_limited_to_50_tokens_by_default(tmp_path, monkeypatch):
    model = tiny_model(vocab_size=NUM_IDS, eos_token_id=None)
    # all tokens have the same embedding, so every step samples from the same distribution
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[0].clone()
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    drawn = set()

    def put(streamer, value):
        streamer.next_tokens_are_prompt = False
        drawn.update(value.flatten().tolist())

    monkeypatch.setattr(TextStreamer, "put", put)
    main(["generate", str(tmp_path), "x", "--max-new-tokens", "150", "--temperature", "100", "--device", "cpu"])
    assert len(drawn) > 60


def test_token_types_of_a_tokenizer_are_ignored(folder, tmp_path, capsys):
    tiny_model(vocab_size=NUM_IDS, eos_token_id=None).save_pretrained(tmp_path)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    byte_tokenizer(model_input_names=names).save_pretrained(tmp_path)
    assert "token_type_ids" in AutoTokenizer.from_pretrained(tmp_path)("x")
    options = ("x", "--max-new-tokens", 4, "--device", "cpu")
    _, expected, _ = printed(capsys, "generate", folder, *options)
    assert printed(capsys, "generate", tmp_path, *options)[:2] == (0, expected)


@pytest.mark.parametrize(
    "left", [{"do_sample": True, "temperature": 5.0}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str
)
def test_the_checkpoints_generation_config_changes_neither_greedy_text_nor_cache(folder, tmp_path, capsys, left):
    model = tiny_model(vocab_size=NUM_IDS, eos_token_id=None)
    model.generation_config.update(**left)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    options = ("x", "--max-new-tokens", 8, "--device", "cpu")
    _, expected, expected_table = printed(capsys, "generate", folder, *options)
    status, out, table = printed(capsys, "generate", tmp_path, *options)
    assert (status, out) == (0, expected)
    assert row(table, "cache held") == row(expected_table, "cache held")


def test_chat_puts_the_prompt_into_the_template(folder, tmp_path, capsys):
    tiny_model(vocab_size=NUM_IDS, eos_token_id=None).save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "User: {{ messages[0]['content'] }} Assistant:"
    tokenizer.save_pretrained(tmp_path)
    expected = reference_text(folder, "User: hi Assistant:", 5)
    capsys.readouterr()
    _, out, _ = printed(capsys, "generate", tmp_path, "hi", "--chat", "--max-new-tokens", 5, "--device", "cpu")
    assert out == expected + "\n"


def test_generate_writes_nothing_but_text_and_table(folder, capsys):
    _, _, err = printed(capsys, "generate", folder, "x", "--max-new-tokens", 2, "--device", "cpu")
    assert all(line[0] in "┌│└" for line in err.splitlines())


def test_generate_restores_transformers_logging(folder, capsys):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    main(["generate", str(folder), "x", "--max-new-tokens", "1", "--device", "cpu"])
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_generate_refuses_in_one_sentence(folder, tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path)
    capsys.readouterr()
    assert_refused(capsys, "generate", tmp_path / "absent", "x", saying="does not exist")
    assert_refused(capsys, "generate", tmp_path, "x", saying="expected tokenizer.json")
    assert_refused(capsys, "generate", folder, "", saying="at least one token")
    assert_refused(capsys, "generate", folder, "x", "--chat", saying="leave --chat out")
    assert_refused(capsys, "generate", folder, "x", "--top-p", 0.5, saying="--top-p needs a --temperature")
    greedy = ("--temperature", 0, "--top-p", 0.5)
    assert_refused(capsys, "generate", folder, "x", *greedy, saying="--top-p needs a --temperature above 0")
    assert_refused(capsys, "generate", folder, "x", "--device", "nowhere", saying="--device must be a name")
    for device in (f"cuda:{torch.cuda.device_count()}", "cuda:99"):
        assert_refused(capsys, "generate", folder, "x", "--device", device, saying="--device must be available")


@pytest.mark.parametrize(
    "option", [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--top-p", "1.5"), ("--temperature", "warm")]
)
def test_numbers_out_of_range_are_refused_by_name(folder, capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(folder), "x", *option])
    assert stopped.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_generating_needs_no_gradient(folder, monkeypatch):
    states = []
    forward = deepseek_latent.DeepseekV2ForCausalLM.forward
    monkeypatch.setattr(
        deepseek_latent.DeepseekV2ForCausalLM,
        "forward",
        lambda self, *arguments, **options: (
            states.append(torch.is_grad_enabled()),
            forward(self, *arguments, **options),
        )[1],
    )
    main(["generate", str(folder), "x", "--max-new-tokens", "2", "--device", "cpu"])
    assert states == [False, False]


class TestAConversation:
    """`generate --chat` without a prompt reads messages from stdin."""

    TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}a: "

    @pytest.fixture
    def place(self, tmp_path):
        tiny_model(vocab_size=NUM_IDS, eos_token_id=None).save_pretrained(tmp_path)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = self.TEMPLATE
        tokenizer.save_pretrained(tmp_path)
        return tmp_path

    def test_each_message_is_answered_after_all_before_it(self, place, folder, capsys, monkeypatch):
        first = reference_text(folder, "u: hi\na: ", 5)
        second = reference_text(folder, f"u: hi\na: {first}\nu: why?\na: ", 5)
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", StringIO("hi\n\nwhy?\n"))
        status, out, err = printed(capsys, "generate", place, "--chat", "--max-new-tokens", 5, "--device", "cpu")
        assert (status, out) == (0, f"{first}\n{second}\n")
        assert row(err, "new tokens") == ["5"]

    def test_an_answer_reads_only_tokens_that_the_cache_does_not_hold(self, place, capsys, monkeypatch):
        read = []
        forward = deepseek_latent.DeepseekV2ForCausalLM.forward

        def counting(self, input_ids, **options):
            read.append(input_ids.shape[1])
            return forward(self, input_ids, **options)

        monkeypatch.setattr(deepseek_latent.DeepseekV2ForCausalLM, "forward", counting)
        long = "x" * 90
        monkeypatch.setattr("sys.stdin", StringIO(f"{long}\ny\n"))
        printed(capsys, "generate", place, "--chat", "--max-new-tokens", 3, "--device", "cpu")
        prompts = [num for num in read if num > 1]
        assert prompts[0] == len(f"u: {long}\na: ")
        # at most the whole first answer, which may be tokenized differently, and the second message
        assert len(prompts) == 2
        assert prompts[1] <= 3 * 4 + len("\nu: y\na: ")

    def test_a_conversation_beyond_the_models_length_is_refused(self, place, capsys, monkeypatch):
        config = json.loads((place / "config.json").read_text())
        (place / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
        monkeypatch.setattr("sys.stdin", StringIO("z" * 40))
        status, _, err = printed(capsys, "generate", place, "--chat", "--max-new-tokens", 3, "--device", "cpu")
        assert status == 2
        assert "the conversation has 47 tokens, expected fewer than 40; start a new one" in err

    def test_the_tokenizer_of_another_model_is_refused(self, place, capsys, monkeypatch):
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = self.TEMPLATE
        tokenizer.add_tokens(["<beyond>"] + [f"<{i}>" for i in range(NUM_IDS)])
        tokenizer.save_pretrained(place)
        monkeypatch.setattr("sys.stdin", StringIO(f"<{NUM_IDS - 1}>\n"))
        status, out, err = printed(capsys, "generate", place, "--chat", "--device", "cpu")
        assert (status, out) == (2, "")
        assert f"expected a tokenizer of at most {NUM_IDS:,} tokens" in err

    def test_token_types_of_a_tokenizer_are_ignored(self, place, capsys, monkeypatch):
        outputs = []
        for options in ({}, {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}):
            tokenizer = byte_tokenizer(**options)
            tokenizer.chat_template = self.TEMPLATE
            tokenizer.save_pretrained(place)
            monkeypatch.setattr("sys.stdin", StringIO("hi\n"))
            outputs.append(printed(capsys, "generate", place, "--chat", "--max-new-tokens", 5, "--device", "cpu")[:2])
        assert outputs[0] == outputs[1]
        assert outputs[0][0] == 0

    def test_nothing_to_answer_is_no_error(self, place, capsys, monkeypatch):
        monkeypatch.setattr("sys.stdin", StringIO(""))
        assert printed(capsys, "generate", place, "--chat", "--device", "cpu") == (0, "", "")

    def test_without_chat_a_prompt_is_required(self, place, capsys):
        assert_refused(capsys, "generate", place, saying="expected a PROMPT")
