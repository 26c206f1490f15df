"""Folders with configs and checkpoints, for the tests of the model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_latent import DeepseekV2Config
from tests.model.official_checkpoints import official_tensors, write_checkpoint
from tests.support import V2, tiny_model


@pytest.fixture
def write_config(tmp_path):
    """Writes a config.json and returns its folder."""

    def write(config: dict[str, Any]) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)

    return write


@pytest.fixture
def saved(tmp_path_factory):
    """Saves a configuration, and returns the config.json that it wrote and its folder."""

    def save(config: DeepseekV2Config) -> tuple[dict[str, Any], str]:
        folder = tmp_path_factory.mktemp("saved")
        config.save_pretrained(folder)
        return json.loads((folder / "config.json").read_text()), str(folder)

    return save


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The tensors of a small official checkpoint in float32."""
    return official_tensors(DeepseekV2Config(**V2), torch.float32)


@pytest.fixture
def checkpoint(tmp_path, official):
    """Writes a folder with the official tensors, without some or with changed ones, and returns its path."""

    def write(without: str | None = None, changed: dict[str, Tensor] | None = None) -> Path:
        tensors = {name: t for name, t in official.items() if without is None or without not in name}
        assert without is None or len(tensors) < len(official)
        return write_checkpoint(tmp_path / "checkpoint", DeepseekV2Config(**V2), tensors | (changed or {}))

    return write
