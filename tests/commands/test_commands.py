"""Every command explains itself and refuses unusable input in one sentence."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

import deepseek_latent
from deepseek_latent.cache.format import CACHE_DTYPES
from deepseek_latent.commands.terminal import run_action
from deepseek_latent.conversion.target import DEFAULT_SHARD_BYTES
from deepseek_latent_command import main, parse
from tests.commands.terminal import assert_refused

COMMANDS = ["generate", "inspect", "convert", "verify", "experts", "export-code", "run"]
KINDS = ["gqa-to-mla", "upcycle", "cast", "import-deepseek", "export-deepseek", "adapter"]
# the options, and what is printed
AT_ONCE = [
    (["--version"], "deepseek-latent "),
    (["--help"], "COMMAND"),
    *(([command, "--help"], command) for command in COMMANDS),
    *((["convert", kind, "--help"], kind) for kind in KINDS),
    ([], "the following arguments are required: COMMAND"),
    (["translate"], "invalid choice: 'translate'"),
    (["convert", "cast", "SRC"], "the following arguments are required: OUT"),
    (["convert", "cast", "SRC", "OUT", "--max-shard-size", "5"], "expected a whole number of KB"),
    (["convert", "cast", "model.gguf", "OUT"], "only gqa-to-mla and upcycle read GGUF files"),
    (["convert", "import-deepseek", "SRC", "OUT", "--gguf-file", "x"], "unrecognized arguments: --gguf-file x"),
    (["convert", "cast", "SRC", "OUT", "--replace-any-folder"], "add --force"),
    (
        ["convert", "gqa-to-mla", "SRC", "OUT", "--kv-lora-rank", "8", "--calibrate", "TEXT"],
        "compression needs --kv-lora-rank, --qk-rope-head-dim and --calibrate; add --qk-rope-head-dim.",
    ),
    (
        ["convert", "gqa-to-mla", "SRC", "OUT", "--qk-rope-head-dim", "8"],
        "add --kv-lora-rank and --calibrate.",
    ),
    (["generate", "MODEL"], "expected a PROMPT"),
    (["generate", "MODEL", "x", "--top-p", "0.5"], "--top-p needs a --temperature above 0"),
    (["generate", "MODEL", "--chat", "x", "y"], "unrecognized arguments: y"),
    # the usage is that of the command
    (["generate", "MODEL", "x", "--optimise"], "usage: deepseek-latent generate "),
    (["convert", "cast", "SRC", "OUT", "--optimise"], "usage: deepseek-latent convert cast "),
    (["verify", "OUT", "--gguf-file", "x"], "add --against"),
    (["experts", "MODEL", "--text", "FILE", "--by", "gate"], "--by and --threshold"),
    (["experts", "MODEL", "--text", "FILE", "--esft", "JSON", "--threshold", "2"], "--threshold must be"),
    (["run"], "expected -m MODULE or a script"),
]


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"deepseek-latent {deepseek_latent.__version__}\n"


def test_help_version_and_errors_in_options_import_neither_torch_nor_transformers():
    """They take seconds to import."""
    program = """
import io, sys
from contextlib import redirect_stderr, redirect_stdout
from deepseek_latent_command import main
for options, expected in eval(sys.argv[1]):
    with redirect_stdout(printed := io.StringIO()), redirect_stderr(printed):
        try:
            status = main(options)
        except SystemExit as stopped:
            status = stopped.code
    assert status == (0 if {"--help", "--version"} & {*options} else 2), (options, status)
    assert expected in printed.getvalue(), (options, printed.getvalue())
    assert not {"torch", "transformers", "deepseek_latent"} & sys.modules.keys(), options
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, repr(AT_ONCE)], check=True, cwd=root)


def test_options_have_the_choices_and_defaults_of_the_package():
    for cache_dtype in CACHE_DTYPES[1:]:
        assert parse(["generate", "M", "x", "--cache-dtype", cache_dtype]).cache_dtype == cache_dtype
    assert parse(["convert", "cast", "SRC", "OUT"]).max_shard_size == DEFAULT_SHARD_BYTES


def test_the_prompt_may_follow_an_option():
    for options in (["M", "hi", "--chat"], ["M", "--chat", "hi"], ["--chat", "M", "hi"], ["M", "--seed", "1", "hi"]):
        arguments = parse(["generate", *options])
        assert (arguments.model, arguments.prompt) == ("M", "hi")
    for options in (["M", "--", "-x is"], ["M", "--seed", "1", "--", "-x is"]):
        assert parse(["generate", *options]).prompt == "-x is"


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "FILE", "x"],
        ["experts", "FILE", "--text", "FILE"],
        ["verify", "FILE"],
        ["convert", "cast", "FILE", "OUT"],
        ["convert", "gqa-to-mla", "FILE", "OUT"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_a_config_in_place_of_its_folder_is_refused_with_the_folders_name(command, tmp_path, capsys):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "deepseek_v2"}')
    command = [str(file) if word == "FILE" else word for word in command]
    assert_refused(capsys, *command, saying=f"got the file {file}; name its folder, {tmp_path}.")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (FileNotFoundError(2, "No such file or directory", "a"), "No such file or directory: 'a'."),
        (FileExistsError(17, "File exists", "a", None, "b"), "File exists: 'a' and 'b'."),
        (OSError(5, "Input/output error"), "Input/output error."),
        (OSError("expected a disk"), "expected a disk"),
    ],
    ids=str,
)
def test_errors_of_the_system_are_told_without_their_number(error, told, capsys):
    def act(arguments):
        raise error

    assert run_action(act, Namespace(), "deepseek-latent x") == 2
    assert capsys.readouterr().err == f"deepseek-latent x: {told}\n"


def test_a_long_error_loses_its_middle_and_no_part_of_a_word(capsys):
    words = [f"word{i}" for i in range(400)]

    def act(arguments):
        raise ValueError(" ".join(words))

    run_action(act, Namespace(), "deepseek-latent x")
    told = capsys.readouterr().err.split()[2:]
    assert (told[0], told[-1]) == ("word0", "word399")
    assert {*told} <= {*words, "..."}


@pytest.mark.parametrize("command", COMMANDS)
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
    assert_refused(capsys, "inspect", tmp_path, saying="expected JSON in")
    os.remove(config)
    assert_refused(capsys, "inspect", tmp_path, saying="has no config.json")
    assert_refused(capsys, "inspect", config, saying="does not exist")
