"""A tiny model with some experts in training, and a training step."""

import torch

from deepseek_latent.finetuning.esft import train_experts
from deepseek_latent.finetuning.expert_selection import ExpertSelection
from tests.support import random_ids, tiny_model

CHOSEN = {1: [7, 2, 5], 2: [0]}


def model_in_training(dtype=torch.float32, selection: ExpertSelection | None = None, **variant):
    model = tiny_model(dtype, **variant).train()
    train_experts(model, selection or ExpertSelection(CHOSEN))
    return model


def step(model, lr: float = 0.5, seed: int = 1) -> float:
    """Takes one step of gradient descent, and returns the loss before it."""
    ids = random_ids(3, 40, seed)
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=lr)
    optimizer.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss.item()
