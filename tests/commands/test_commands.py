"""The command line: what it prints, what it refuses in one sentence, and that tools run under it as under python."""

import os
import re
import shutil
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextStreamer
from transformers.utils import logging

import deepseek_latent
from deepseek_latent.commands.__main__ import main
from tests.support import V2, tiny_model

NUM_IDS = 264  # 256 bytes, two special tokens, and a few that the tokenizer does not know


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint that never ends a text, with its tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(vocab_size=NUM_IDS, eos_token_id=None).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def as_process(monkeypatch):
    """Puts back what `run` changes for the rest of a process."""
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))


def printed(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def row(text: str, name: str) -> list[str]:
    """The cells beside `name` in a printed table."""
    cells = next(line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in re.split("[│┃]", cells)[2:-1]]


def assert_refused(capsys, *arguments, saying: str) -> None:
    status, out, err = printed(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert saying in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


# generate


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


def test_generate_names_unreadable_weights_in_one_sentence(folder, tmp_path, capsys):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    status, _, err = printed(capsys, "generate", broken, "latent")
    assert status == 2
    assert f"expected readable weights in {broken}" in err
    assert len(err.splitlines()) == 1


def test_generate_counts_the_cache_the_model_really_held(folder, capsys):
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


@pytest.mark.parametrize(("cache_dtype", "row_bytes"), [("int8", 58), ("int6", 50), ("int4", 38), ("fp8", 60)])
def test_generate_holds_the_cache_in_the_cache_dtype_it_was_given(folder, capsys, cache_dtype, row_bytes):
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


def test_sampling_is_not_cut_to_50_tokens_unasked(tmp_path, monkeypatch):
    model = tiny_model(vocab_size=NUM_IDS, eos_token_id=None)
    # all tokens look alike, so every step draws from the same distribution
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


def test_a_tokenizer_that_adds_token_types_is_understood(folder, tmp_path, capsys):
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
def test_what_a_checkpoint_brings_along_changes_neither_greedy_text_nor_cache(folder, tmp_path, capsys, left):
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


def test_generate_leaves_transformers_logging_as_it_was(folder, capsys):
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
    assert_refused(capsys, "generate", folder, "x", "--device", "nowhere", saying="--device must be a name")
    assert_refused(capsys, "generate", folder, "x", "--device", "cuda:99", saying="--device must be there")


@pytest.mark.parametrize(
    "option", [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--top-p", "1.5"), ("--temperature", "warm")]
)
def test_numbers_out_of_range_are_refused_by_name(folder, capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main(["generate", str(folder), "x", *option])
    assert stopped.value.code == 2
    assert option[0] in capsys.readouterr().err


# run


def test_run_gives_a_script_the_plugin_its_arguments_and_its_folder(tmp_path, capsys, as_process):
    (tmp_path / "neighbour.py").write_text("NAME = 'neighbour'\n")
    (tmp_path / "tool.py").write_text(
        "import sys, neighbour\n"
        "from transformers import AutoConfig\n"
        "print(__name__, sys.argv[1:], sys.path[0], neighbour.NAME)\n"
        "print(type(AutoConfig.for_model('deepseek_v2')).__module__)\n"
    )
    status, out, _ = printed(capsys, "run", tmp_path / "tool.py", "--flag", "-m", "x", "--", "y")
    assert status == 0
    assert out.splitlines() == [
        f"__main__ ['--flag', '-m', 'x', '--', 'y'] {tmp_path} neighbour",
        "deepseek_latent.configuration_deepseek_v2",
    ]


def test_run_m_runs_a_module_of_the_working_folder(tmp_path, capsys, as_process, monkeypatch):
    (tmp_path / "lonely_tool.py").write_text("import sys\nprint(__name__, sys.argv, sys.path[0])\n")
    monkeypatch.chdir(tmp_path)
    status, out, _ = printed(capsys, "run", "-m", "lonely_tool", "--model", "m", "-m", "n")
    assert status == 0
    argv = [str(tmp_path / "lonely_tool.py"), "--model", "m", "-m", "n"]
    assert out == f"__main__ {argv} {tmp_path}\n"


def test_run_m_runs_the_main_of_a_package(tmp_path, capsys, as_process, monkeypatch):
    (tmp_path / "packed_tool").mkdir()
    (tmp_path / "packed_tool" / "__init__.py").touch()
    (tmp_path / "packed_tool" / "__main__.py").write_text("print('main of', __package__)\n")
    monkeypatch.chdir(tmp_path)
    assert printed(capsys, "run", "-m", "packed_tool")[:2] == (0, "main of packed_tool\n")


@pytest.mark.parametrize("code", [0, 3, "broken"])
def test_the_tools_exit_code_is_ours(tmp_path, as_process, code):
    (tmp_path / "tool.py").write_text(f"raise SystemExit({code!r})\n")
    with pytest.raises(SystemExit) as stopped:
        main(["run", str(tmp_path / "tool.py")])
    assert stopped.value.code == code


def test_the_tools_own_errors_keep_their_traceback(tmp_path, as_process):
    (tmp_path / "tool.py").write_text("raise ValueError('of the tool')\n")
    with pytest.raises(ValueError, match="of the tool"):
        main(["run", str(tmp_path / "tool.py")])


def test_a_package_the_tool_lacks_is_not_blamed_on_the_command_line(tmp_path, as_process, monkeypatch):
    (tmp_path / "lacking").mkdir()
    (tmp_path / "lacking" / "__init__.py").write_text("import a_package_nobody_has\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_nobody_has"):
        main(["run", "-m", "lacking.tool"])


def test_run_refuses_in_one_sentence(tmp_path, capsys, as_process, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mainless").mkdir()
    (tmp_path / "mainless" / "__init__.py").touch()
    assert_refused(capsys, "run", saying="expected -m MODULE or a script")
    assert_refused(capsys, "run", "-m", saying="expected -m MODULE or a script")
    assert_refused(capsys, "run", tmp_path / "absent.py", saying="does not exist")
    assert_refused(capsys, "run", "-m", "a_module_nobody_has", saying="not found")
    assert_refused(capsys, "run", "-m", "a_package_nobody_has.tool", saying="not found")
    assert_refused(capsys, "run", "-m", "mainless", saying="not found")


# the command line itself


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"deepseek-latent {deepseek_latent.__version__}\n"


@pytest.mark.parametrize("command", ["generate", "inspect", "export-code", "run"])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"deepseek-latent {command}" in capsys.readouterr().out


def test_errors_of_configs_fit_one_line(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "deepseek_v2", "hidden_size": "wide"}')
    assert_refused(capsys, "inspect", tmp_path, saying="hidden_size")
    config.write_text('{"model_type": "deepseek_v2", "q_lora_rank": 0}')
    assert_refused(capsys, "inspect", config, saying="q_lora_rank must be at least 1")
    config.write_text('{"model_type": "llama"}')
    assert_refused(capsys, "inspect", tmp_path, saying="model_type must be 'deepseek_v2', got 'llama'")
    config.write_text('{"model_type": "deepseek_v2", "architectures": ["DeepseekV3ForCausalLM"]}')
    assert_refused(capsys, "inspect", tmp_path, saying="architectures must name one of")
    config.write_text("{")
    assert_refused(capsys, "inspect", tmp_path, saying="not a valid JSON")
    os.remove(config)
    assert_refused(capsys, "inspect", tmp_path, saying="has no config.json")
    assert_refused(capsys, "inspect", config, saying="does not exist")


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
