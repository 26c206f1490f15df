"""Fixtures of the tests of `PromptCache`."""

import pytest

from tests.support import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "prompts"
