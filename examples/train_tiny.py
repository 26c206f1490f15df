"""Trains a DeepSeek-V2 of a few million parameters on Python's help topics, and writes its checkpoint.

    python examples/train_tiny.py

writes weights, tokenizer, model card, held-out text and the figures measured on it to examples/pydoc-tiny.
"""

import argparse
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from string import Template

import torch
import transformers
from pydoc_text import (
    BETWEEN_DOCUMENTS,
    WINDOW,
    NGrams,
    Windows,
    bytes_per_token,
    encode,
    split_topics,
    train_tokenizer,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import deepseek_latent
from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM, activity_of
from deepseek_latent.conversion.size import expanded_width, idle_parameters

HERE = Path(__file__).parent
BATCH = 8

# uses every mechanism of the architecture, with widths that all differ
CONFIG = {
    "vocab_size": 2048,
    "hidden_size": 168,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "q_lora_rank": 104,
    "kv_lora_rank": 80,
    "qk_nope_head_dim": 40,
    "qk_rope_head_dim": 16,
    "v_head_dim": 24,
    "intermediate_size": 416,
    "moe_intermediate_size": 72,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    # an untrained router gives each of 16 experts 1/16, so this makes the weights of four experts sum to 1
    "routed_scaling_factor": 4.0,
    "aux_loss_alpha": 0.003,
    "attention_dropout": 0.1,
    "initializer_range": 0.03,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
}


def training_arguments(folder: str, *, steps: int, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        seed=seed,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.3,
        adam_beta2=0.95,
        eval_strategy="steps",
        eval_steps=max(steps // 8, 1),
        logging_steps=max(steps // 40, 1),
        save_strategy="no",
        prediction_loss_only=True,
        dataloader_pin_memory=False,
        report_to="none",
    )


def measured(
    model_nats: float, windows: Windows, training_tokens: Tensor, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float | int]:
    """Nats per token and bits per byte of the model and of the n-gram models, for the same predictions."""
    contexts, targets = windows.rows()[:, :-1], windows.rows()[:, 1:]
    counts = NGrams(training_tokens, len(tokenizer))
    nats = {
        "model": model_nats,
        "bigram": counts.bigram_nats(contexts, targets),
        "unigram": counts.unigram_nats(targets),
    }
    num_bytes = int(bytes_per_token(tokenizer)[targets].sum())
    bits = {name: x / math.log(2) * targets.numel() / num_bytes for name, x in nats.items()}
    return {
        **{f"{name}_nats_per_token": x for name, x in nats.items()},
        **{f"{name}_bits_per_byte": x for name, x in bits.items()},
        "held_out_tokens": targets.numel(),
        "held_out_bytes": num_bytes,
    }


def write_card(folder: Path, figures: dict, config: DeepseekV2Config) -> None:
    facts = config.to_dict() | figures
    facts |= {"cached_width": config.cached_width, "expanded_width": expanded_width(config), "window": WINDOW}
    facts["original_positions"] = config.rope_parameters["original_max_position_embeddings"]
    facts["even_share"] = 1 / config.n_routed_experts
    written = {float: "{:.4g}".format, int: "{:,}".format}
    card = Template((HERE.parent / "model_card" / "pydoc-tiny.md.template").read_text(encoding="utf-8"))
    text = card.substitute({name: written.get(type(fact), str)(fact) for name, fact in facts.items()})
    (folder / "README.md").write_text(text, encoding="utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "pydoc-tiny", help="folder to write (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="write into that folder even if it exists")
    parser.add_argument("--steps", type=int, default=600, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}.")
    if options.out.exists() and not options.force:
        parser.error(f"{options.out} exists; name another folder with --out, or write into it with --force.")
    return options


def main() -> None:
    options = read_options()
    transformers.set_seed(options.seed)
    training, held_out = split_topics()
    tokenizer = train_tokenizer(training, CONFIG["vocab_size"], CONFIG["max_position_embeddings"])
    training_tokens, held_out_tokens = encode(tokenizer, training), encode(tokenizer, held_out)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    starts = torch.randint(len(training_tokens) - WINDOW, (options.steps * BATCH,))
    training_windows = Windows(training_tokens, starts, padding=tokenizer.pad_token_id, padded_share=0.1)
    held_out_windows = Windows(held_out_tokens, torch.arange(0, len(held_out_tokens) - WINDOW + 1, WINDOW))
    # the balance losses of all tokens of a batch are part of the training loss
    model = DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG, **special, output_router_logits=True, seq_aux=False))

    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(scratch, steps=options.steps, seed=options.seed)
        start = time.perf_counter()
        Trainer(model, args=arguments, train_dataset=training_windows, eval_dataset=held_out_windows).train()
        minutes = (time.perf_counter() - start) / 60

        # Trainer turned the first off; the others are for this training only, not for fine-tuning
        trained = {"use_cache": True, "output_router_logits": False, "seq_aux": True, "attention_dropout": 0.0}
        model.config.update(trained)
        model.to(torch.bfloat16).save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)
        (options.out / "held_out.txt").write_text(BETWEEN_DOCUMENTS.join(held_out), encoding="utf-8")

        # the figures are measured on the saved model, in bfloat16
        model = AutoModelForCausalLM.from_pretrained(options.out)
        model_nats = Trainer(model, args=arguments, eval_dataset=held_out_windows).evaluate()["eval_loss"]

    figures = measured(model_nats, held_out_windows, training_tokens, tokenizer) | {
        "topics": len(training) + len(held_out),
        "held_out_topics": len(held_out),
        "training_tokens": len(training_tokens),
        "steps": options.steps,
        "epochs": options.steps * BATCH * WINDOW / len(training_tokens),
        "seed": options.seed,
        "minutes": minutes,
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "active_parameters": model.num_parameters() - idle_parameters(model.config),
        "busiest_share": activity_of(model, held_out_windows.rows()).shares.max().item(),
        "command": f"python examples/train_tiny.py --steps {options.steps} --seed {options.seed} --out FOLDER",
        "python": platform.python_version(),
        "deepseek_latent": deepseek_latent.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (options.out / "training.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_card(options.out, figures, model.config)
    print((options.out / "README.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
