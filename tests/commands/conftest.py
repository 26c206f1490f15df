"""A checkpoint with a tokenizer, for all tests of commands."""

import pytest

from tests.commands.terminal import NUM_IDS, byte_tokenizer
from tests.support import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer and no end-of-text token."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model(vocab_size=NUM_IDS, eos_token_id=None).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
