"""The text that the tiny model learns, the text held out from it, and n-gram models as baselines."""

import zlib
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
BETWEEN_DOCUMENTS = "\f"
WINDOW = 256


def split_topics() -> tuple[list[str], list[str]]:
    """The help topics of Python's `help()`, as training and held-out text.

    Topics repeat each other, so a paragraph of eight words or more is kept only in the shortest topic that has it, and
    is on one side only. A topic's side depends on its name alone, not on the version of Python.
    """
    seen: set[str] = set()
    training, held_out = [], []
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        kept = []
        for paragraph in topics[name].strip().split("\n\n"):
            words = paragraph.split()
            if len(words) < 8 or " ".join(words) not in seen:
                kept.append(paragraph)
            seen.add(" ".join(words))
        (held_out if zlib.crc32(name.encode()) % 10 == 1 else training).append("\n\n".join(kept))
    return training, held_out


def train_tokenizer(documents: list[str], vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE, which encodes any text and decodes it unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=model_max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> Tensor:
    """All documents in one row of tokens [s], each between a begin and an end token."""
    rows = tokenizer(documents, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in [*row, tokenizer.eos_token_id]])


def bytes_per_token(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The number of bytes of each token, [vocab]; the byte-level alphabet has one letter per byte."""
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if token in tokenizer.all_special_tokens else len(token) for token in tokens])


class Windows(Dataset):
    """Windows of WINDOW tokens of one row, which begin at `starts`.

    A fraction `padded_share` of the inputs, but not of the labels, is replaced by `padding`, whose embedding is zero.
    Without that, the model soon memorizes such a small text.
    """

    def __init__(self, tokens: Tensor, starts: Tensor, *, padding: int = 0, padded_share: float = 0.0):
        self.tokens, self.starts = tokens, starts.tolist()
        self.padding, self.padded_share = padding, padded_share

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.tokens[self.starts[index] :][:WINDOW]
        is_padded = torch.rand(WINDOW) < self.padded_share
        return {"input_ids": window.masked_fill(is_padded, self.padding), "labels": window}

    def rows(self) -> Tensor:
        """[windows s]"""
        return torch.stack([window["input_ids"] for window in self])


class NGrams:
    """Unigram and bigram models from the counts [vocab], [vocab vocab] of the training tokens.

    The unigram model adds one to every count. The bigram model is interpolated Kneser-Ney: it subtracts a `discount`
    from the count of every seen pair, and gives the freed probability to tokens by their number of different contexts.
    The discount maximizes the likelihood of the training pairs, each left out in turn.
    """

    def __init__(self, tokens: Tensor, vocab_size: int):
        self.singles = torch.bincount(tokens, minlength=vocab_size).double()
        pairs = torch.bincount(tokens[:-1] * vocab_size + tokens[1:], minlength=vocab_size**2)
        self.pairs = pairs.view(vocab_size, vocab_size).double()
        self.discount = min((i / 10 for i in range(1, 10)), key=self.left_out_nats)

    def unigram_nats(self, targets: Tensor) -> float:
        smoothed = self.singles + 1
        return -(smoothed / smoothed.sum()).log()[targets].mean().item()

    def bigram_nats(self, contexts: Tensor, targets: Tensor) -> float:
        seen = self.pairs[contexts, targets]
        freed = self.discount * (self.pairs > 0).sum(1)[contexts]
        follows = self.follows()[targets]
        total = self.pairs.sum(1)[contexts]
        known = ((seen - self.discount).clamp(min=0) + freed * follows) / total.clamp(min=1)
        return -torch.where(total > 0, known, follows).log().mean().item()

    def follows(self) -> Tensor:
        """The number of different tokens that each token has followed, plus one, as a fraction of their sum [vocab]."""
        contexts = (self.pairs > 0).sum(0) + 1.0
        return contexts / contexts.sum()

    def left_out_nats(self, discount: float) -> float:
        count = self.pairs
        # leaving a pair out lowers its count by one, and removes its kind if it was seen once
        kinds = (count > 0).sum(1, keepdim=True) - (count == 1).double()
        freed = discount * kinds * self.follows()
        left = (count.sum(1, keepdim=True) - 1).clamp(min=1)
        nats = -(((count - 1 - discount).clamp(min=0) + freed) / left).clamp(min=1e-12).log()
        return (nats * count).sum().item() / count.sum().item()
