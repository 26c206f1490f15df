"""Fine-tuning: LoRA by peft, packed experts, expert-specialized fine-tuning, what routers choose."""
