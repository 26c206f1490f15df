"""Fine-tuning: LoRA by peft, packed experts, expert-specialized fine-tuning, statistics of routers."""
