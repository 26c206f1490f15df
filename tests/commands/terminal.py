"""Runs commands in this process, reads what they print, and makes a tokenizer of bytes."""

import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deepseek_latent.commands.__main__ import main

NUM_IDS = 264  # 256 bytes, two special tokens, and six that the tokenizer does not have


def byte_tokenizer(**options) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **options)


def printed(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def row(text: str, name: str) -> list[str]:
    """The other cells of the row `name` in a printed table."""
    cells = next(line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in re.split("[│┃]", cells)[2:-1]]


def assert_refused(capsys, *arguments, saying: str) -> None:
    status, out, err = printed(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert saying in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
