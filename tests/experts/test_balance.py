"""The balance losses equal those of the paper, ignore padding, and count once in a step of training."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from deepseek_latent import DeepseekV2Config
from deepseek_latent.experts.balance import balance_losses, fraction_of_batch
from deepseek_latent.experts.dropping import padding_mask_as_bool
from tests import reference
from tests.support import LITE, V2, random_ids, tiny_model

DEVICES = {"num_devices": 4, "devices_per_token": 2}


def routed(b: int = 3, s: int = 11, e: int = 12, k: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    # lopsided, so that no load is even
    scores = (torch.randn(b, s, e) * 2 + torch.linspace(0, 2, e)).softmax(dim=-1)
    return scores, scores.topk(k).indices


@pytest.mark.parametrize("sequence_wise", [True, False])
def test_losses_equal_those_of_the_paper(sequence_wise):
    scores, chosen = routed()
    losses = balance_losses(scores, chosen, torch.ones(3, 11, dtype=torch.bool), sequence_wise=sequence_wise, **DEVICES)
    assert losses.expert.item() == pytest.approx(reference.expert_balance_loss(scores, chosen, sequence_wise).item())
    if not sequence_wise:
        scores, chosen = (x.flatten(0, 1)[None] for x in (scores, chosen))
    assert losses.device.item() == pytest.approx(reference.device_balance_loss(scores, chosen, 4).item())
    communication = reference.communication_balance_loss(scores, chosen, 4, 2)
    assert losses.communication.item() == pytest.approx(communication.item())


def test_losses_of_an_even_load_are_one():
    scores, chosen = torch.full((2, 4, 12), 1 / 12), torch.arange(12).view(4, 3).expand(2, 4, 3)
    is_token = torch.ones(2, 4, dtype=torch.bool)
    even = balance_losses(scores, chosen, is_token, num_devices=4, devices_per_token=1, sequence_wise=True)
    assert [x.item() for x in even] == pytest.approx([1, 1, 1])
    one_device_for_all = balance_losses(
        scores, chosen[:, :1].expand(2, 4, 3), is_token, num_devices=4, devices_per_token=1, sequence_wise=True
    )
    # even scores make the loss 1 for any load
    assert one_device_for_all.expert.item() == pytest.approx(1)
    scores = torch.zeros(2, 4, 12).index_fill_(-1, torch.arange(3), 1 / 3)
    worst = balance_losses(
        scores, chosen[:, :1].expand(2, 4, 3), is_token, num_devices=4, devices_per_token=1, sequence_wise=True
    )
    assert [x.item() for x in worst] == pytest.approx([4, 4, 4])


@pytest.mark.parametrize("sequence_wise", [True, False])
def test_losses_ignore_padding(sequence_wise):
    scores, chosen = routed(b=2)
    is_token = torch.ones(2, 11, dtype=torch.bool)
    is_token[0, :4] = False
    losses = balance_losses(scores, chosen, is_token, sequence_wise=sequence_wise, **DEVICES)
    rows = [(scores[i, is_token[i]][None], chosen[i, is_token[i]][None]) for i in range(2)]
    if sequence_wise:
        parts = [
            balance_losses(*row, torch.ones(row[0].shape[:2], dtype=torch.bool), sequence_wise=True, **DEVICES)
            for row in rows
        ]
        expected = [sum(x) / 2 for x in zip(*parts)]
    else:
        joined = [torch.cat(x, dim=1) for x in zip(*rows)]
        expected = balance_losses(*joined, torch.ones(1, 18, dtype=torch.bool), sequence_wise=True, **DEVICES)
    assert [x.item() for x in losses] == pytest.approx([x.item() for x in expected])
    # a sequence of padding alone does not count in the mean
    is_token[0] = False
    losses = balance_losses(scores, chosen, is_token, sequence_wise=sequence_wise, **DEVICES)
    expected = balance_losses(scores[1:], chosen[1:], is_token[1:], sequence_wise=True, **DEVICES)
    assert [x.item() for x in losses] == pytest.approx([x.item() for x in expected])


def test_only_scores_carry_a_gradient():
    scores, chosen = routed()
    scores.requires_grad_()
    balance_losses(scores, chosen, torch.ones(3, 11, dtype=torch.bool), sequence_wise=True, **DEVICES).expert.backward()
    # the load is a constant factor of the mean score
    load = torch.stack([torch.bincount(x.flatten(), minlength=12) for x in chosen]) * 12 / (3 * 11)
    torch.testing.assert_close(scores.grad, (load / 11 / 3)[:, None].expand(3, 11, 12).float())


@pytest.mark.parametrize("variant", [{}, LITE, {"seq_aux": False}], ids=str)
def test_a_model_adds_the_losses_times_their_factors_only_in_training(variant):
    factors = {"aux_loss_alpha": 0.3, "device_aux_loss_alpha": 0.05, "communication_aux_loss_alpha": 0.02}
    model, ids = tiny_model(**variant | factors), random_ids(2, 15)
    plain = model(ids, labels=ids)
    assert plain.aux_loss is None
    out = model(ids, labels=ids, output_router_logits=True)
    assert out.loss.item() == plain.loss.item()
    expected, expert = 0.0, 0.0
    for layer, logits in zip(model.model.layers[1:], out.router_logits):
        scores, (_, chosen) = logits.softmax(dim=-1).view(2, 15, 12), layer.mlp.gate.choose(logits)
        chosen = chosen.view(2, 15, 3)
        one = reference.expert_balance_loss(scores, chosen, model.config.seq_aux)
        if not model.config.seq_aux:
            scores, chosen = (x.flatten(0, 1)[None] for x in (scores, chosen))
        groups = (model.config.n_group, model.config.topk_group)
        expert += one.item()
        expected += 0.3 * one + 0.05 * reference.device_balance_loss(scores, chosen, groups[0])
        expected += 0.02 * reference.communication_balance_loss(scores, chosen, *groups)
    assert out.aux_loss.item() == pytest.approx(expert, rel=1e-5)
    trained = model.train()(ids, labels=ids, output_router_logits=True)
    assert (trained.loss - plain.loss).item() == pytest.approx(expected.item(), rel=1e-4)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.weight.requires_grad_(False)
    assert model(ids, labels=ids, output_router_logits=True).loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)


def test_the_losses_are_added_until_the_last_router_is_frozen():
    model, ids = tiny_model(aux_loss_alpha=0.3).train(), random_ids(2, 15)
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    expected = model(ids, labels=ids, output_router_logits=True).loss.item()
    gates[0].weight.requires_grad_(False)
    assert len(gates) > 1
    assert model(ids, labels=ids, output_router_logits=True).loss.item() == pytest.approx(expected, rel=1e-6)
    for gate in gates:
        gate.weight.requires_grad_(False)
    assert model(ids, labels=ids, output_router_logits=True).loss.item() < expected - 0.1


def test_the_aux_loss_of_a_model_ignores_padding():
    model, ids = tiny_model(), random_ids(1, 9)
    padded, mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1), torch.ones(1, 13, dtype=torch.long)
    mask[:, :4] = 0
    alone = model(ids, output_router_logits=True).aux_loss
    beside = model(padded, attention_mask=mask, output_router_logits=True).aux_loss
    assert beside.item() == pytest.approx(alone.item(), rel=1e-4)


def test_gradients_of_the_aux_loss_alone_even_out_the_load():
    model, ids = tiny_model(aux_loss_alpha=1.0).train(), random_ids(2, 15)
    before = model(ids, labels=ids, output_router_logits=True).aux_loss.item()
    gates = [layer.mlp.gate.weight for layer in model.model.layers[1:]]
    optimizer = torch.optim.SGD(gates, lr=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        model(ids, labels=ids, output_router_logits=True).aux_loss.backward()
        optimizer.step()
    assert model(ids, output_router_logits=True).aux_loss.item() < before - 0.1


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"input_ids": random_ids(4, 12)[index], "labels": random_ids(4, 12)[index]}


def weights_after_a_step(folder, accumulation_steps: int) -> torch.Tensor:
    model = tiny_model(aux_loss_alpha=2.0, output_router_logits=True)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4 // accumulation_steps,
        gradient_accumulation_steps=accumulation_steps,
        max_steps=1,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        use_cpu=True,
    )
    Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    return model.model.layers[1].mlp.gate.weight.detach()


def test_accumulated_gradients_count_the_losses_once(tmp_path):
    """For losses per sequence, the mean over four rows equals the mean over two batches of two rows."""
    whole, halves = weights_after_a_step(tmp_path, 1), weights_after_a_step(tmp_path, 2)
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-6)
    assert (whole - tiny_model().model.layers[1].mlp.gate.weight).abs().max() > 1e-4


def test_router_aux_loss_coef_is_another_name_of_aux_loss_alpha():
    config = DeepseekV2Config(**V2, router_aux_loss_coef=0.25)
    assert config.aux_loss_alpha == config.router_aux_loss_coef == 0.25
    config.router_aux_loss_coef = 0.5
    assert config.aux_loss_alpha == 0.5
    assert "router_aux_loss_coef" not in config.to_dict()
    assert DeepseekV2Config.from_dict(config.to_dict()).aux_loss_alpha == 0.5
    with pytest.raises(ValueError, match="device_aux_loss_alpha must be a number of 0 or more"):
        DeepseekV2Config(**V2, device_aux_loss_alpha=-1.0)


def test_fraction_of_batch_counts_the_labels_that_are_predicted():
    labels = torch.tensor([[5, 6, -100, 7], [-100, 8, 9, 1]])
    # nothing predicts the first label of a row
    assert fraction_of_batch(labels, 20).item() == pytest.approx(5 / 20)
    assert fraction_of_batch(labels, None) == 1.0


def test_of_a_longer_mask_the_last_columns_are_those_of_the_input():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    assert padding_mask_as_bool(mask, (2, 3), mask.device).tolist() == [[True] * 3, [True, False, True]]
