"""What examples/heal.py does: a student is trained to predict what its teacher predicts, and compared with it."""

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from deepseek_latent import DeepseekV2ForCausalLM, lora_config
from deepseek_latent.conversion.text import WINDOW_LENGTH, read_text, tokenize

PROJECTIONS = ["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
LEARNING_RATES = {"attention": 2e-4, "lora": 2e-4, "everything": 1e-4}
WARM_UP = 0.05  # of the training
LORA_RANK = 32


def choose_parameters(student: DeepseekV2ForCausalLM, trained: str) -> nn.Module:
    """Makes only the parameters trainable that `--train` names. Returns the model, with adapters for "lora"."""
    attention = [layer.self_attn for layer in student.model.layers]
    student.requires_grad_(trained == "everything")
    if trained == "lora":
        targets = [name for name in PROJECTIONS if hasattr(attention[0], name)]
        model = get_peft_model(student, lora_config(student, r=LORA_RANK, target_modules=targets))
    else:
        model = student
        for module in attention:
            module.requires_grad_(True)
    for module in attention:
        freeze_constants(module)
    return model


def freeze_constants(attention: nn.Module) -> None:
    """Keeps the constant channel of a latent as `gqa-to-mla` made it, and the norm's weight, which is exact with it.

    The channel is a row of zeros in the projection to the latent, and a large bias. AdamW divides a gradient by its own
    size, so it would move this row as fast as any other, though hardly anything depends on it.
    """
    for name, norm in (("q_a_proj", "q_a_layernorm"), ("kv_a_proj_with_mqa", "kv_a_layernorm")):
        projection = getattr(attention, name, None)
        if projection is None or projection.bias is None:
            continue
        getattr(attention, norm).requires_grad_(False)
        row = projection.bias.abs().argmax()
        # the rows of a LoRA's second factor are those of the weight
        adapters = projection.lora_B.values() if hasattr(projection, "lora_B") else ()
        for parameter in (projection.weight, projection.bias, *(factor.weight for factor in adapters)):
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient, row=row: gradient.index_fill(0, row, 0))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_windows(folder: Path, file: Path, *, at_least: int = 1) -> Tensor:
    """A text as windows [b WINDOW_LENGTH] of tokens, by the tokenizer in `folder`."""
    ids = tokenize(folder, read_text(file))[0]
    if len(ids) < at_least * WINDOW_LENGTH:
        raise ValueError(f"expected a text of at least {at_least * WINDOW_LENGTH} tokens, got {len(ids)} in {file}.")
    return ids[: len(ids) // WINDOW_LENGTH * WINDOW_LENGTH].view(-1, WINDOW_LENGTH)


def mix(texts: list[Tensor]) -> Iterator[Tensor]:
    """Endless windows: the texts take turns, whatever their lengths, each in random order."""

    def shuffled(windows: Tensor) -> Iterator[Tensor]:
        while True:
            yield from windows[torch.randperm(len(windows))]

    yield from itertools.chain.from_iterable(zip(*map(shuffled, texts)))


def divergence(student: nn.Module, teacher: PreTrainedModel, windows: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of the student's next token from the teacher's, in nats, mean over all tokens."""
    with torch.no_grad():
        expected = teacher(input_ids=windows, use_cache=False).logits.float().log_softmax(dim=-1)
    found = student(input_ids=windows, use_cache=False).logits.float().log_softmax(dim=-1)
    return F.kl_div(found, expected, log_target=True, reduction="sum") / windows.numel()


def processor_seconds() -> float:
    """Processor time of this process per thread of torch. Other programs on the machine hardly change it."""
    return time.process_time() / torch.get_num_threads()


def schedule(progress: float) -> float:
    """The factor on the learning rate: a linear warm-up from a tenth, then a linear decay to zero."""
    return min(0.1 + 0.9 * progress / WARM_UP, 1 - progress)


def heal(
    student: nn.Module,
    teacher: PreTrainedModel,
    windows: Iterator[Tensor],  # [WINDOW_LENGTH] each
    *,
    learning_rate: float,
    batch: int,
    seconds: float,
    bfloat16: bool = False,
) -> Iterator[dict]:
    """Trains the student's trainable parameters in place, and yields seconds, tokens and loss after every step.

    Seconds are those of `processor_seconds`, without what is done between steps. The learning rate follows them. With
    `bfloat16`, both models multiply matrices in that dtype, while weights and optimizer stay in float32.
    """
    parameters = trainable(student)
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    spent, tokens = 0.0, 0
    while spent < seconds:
        start = processor_seconds()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * schedule(spent / seconds)
        loss = 0.0
        # one window at a time, so that only its logits are in memory
        for window in itertools.islice(windows, batch):
            with torch.autocast(window.device.type, torch.bfloat16, enabled=bfloat16):
                part = divergence(student, teacher, window[None]) / batch
            part.backward()
            loss += part.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        spent, tokens = spent + processor_seconds() - start, tokens + batch * WINDOW_LENGTH
        yield {"seconds": spent, "tokens": tokens, "divergence": loss}


@torch.no_grad()
def nats(model: nn.Module, windows: Tensor) -> Tensor:
    """[b]: the mean cross-entropy of every token but the first of a window."""

    def of_window(window: Tensor) -> Tensor:
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        return F.cross_entropy(logits, window[1:]).double()

    return torch.stack([of_window(window) for window in windows])


def compare(of_student: Tensor, of_source: Tensor) -> dict[str, float]:
    """Perplexities, and their ratio with the standard error that the choice of windows leaves."""
    excess = of_student - of_source
    ratio = math.exp(excess.mean())
    return {
        "perplexity": math.exp(of_student.mean()),
        "of_source": math.exp(of_source.mean()),
        "ratio": ratio,
        "standard_error_of_ratio": ratio * excess.std().item() / math.sqrt(len(excess)),
    }
