"""Every command explains itself and refuses unusable input in one sentence."""

import os

import pytest

import deepseek_latent
from deepseek_latent.commands.__main__ import main
from tests.commands.terminal import assert_refused


def test_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"deepseek-latent {deepseek_latent.__version__}\n"


@pytest.mark.parametrize("command", ["generate", "inspect", "convert", "verify", "experts", "export-code", "run"])
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
