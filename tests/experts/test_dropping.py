"""Devices with more than their share leave out choices of lowest affinity, in training alone."""

import pytest
import torch

from deepseek_latent import DeepseekV2Config
from deepseek_latent.experts.dropping import TokenDropping
from tests import reference
from tests.support import V2, random_ids, relative_error, tiny_model

DEVICES, EXPERTS, CHOICES = 4, 12, 3
NO_ONE_SPARED = {"device_capacity_factor": 1.0, "never_dropped_share": 0.0}


def lopsided(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (torch.randn(tokens, EXPERTS) * 2 + torch.linspace(0, 3, EXPERTS)).softmax(dim=-1)
    return scores, scores.topk(CHOICES).indices


def dropping(present: torch.Tensor, spared: torch.Tensor, factor: float = 1.0) -> TokenDropping:
    return TokenDropping(present, spared, DEVICES, factor)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("num_spared", [0, 5, 19])
def test_what_is_dropped_is_what_the_paper_drops(num_spared, factor):
    torch.manual_seed(2)
    scores, chosen = lopsided(19)
    spared = torch.arange(19) < num_spared
    kept = dropping(torch.ones(19, dtype=torch.bool), spared, factor).kept(scores, chosen)
    options = {"num_devices": DEVICES, "capacity_factor": factor}
    expected = reference.dropped_choices(scores, chosen, set(range(num_spared)), **options)
    assert {(t, chosen[t, slot].item()) for t, slot in (~kept).nonzero().tolist()} == expected
    assert bool(expected) == (num_spared < 19)


def test_padding_takes_nobodys_place():
    torch.manual_seed(2)
    scores, chosen = lopsided(20)
    present = torch.arange(20) % 3 != 0
    kept = dropping(present, torch.zeros(20, dtype=torch.bool)).kept(scores, chosen)
    num_present = int(present.sum())
    alone = dropping(torch.ones(num_present, dtype=torch.bool), torch.zeros(num_present, dtype=torch.bool))
    assert torch.equal(kept[present], alone.kept(scores[present], chosen[present]))
    assert not kept[present].all()


def test_padding_of_a_spared_row_is_dropped_first():
    """It takes nobody's place, and is not kept because its row is spared."""
    chosen = torch.zeros(4, CHOICES, dtype=torch.long) + torch.arange(CHOICES)
    present = torch.tensor([True, True, False, False])
    limits = TokenDropping(present, torch.tensor([False, False, True, True]), DEVICES, 4.0)
    assert limits.kept(torch.rand(4, EXPERTS), chosen).tolist() == [[True] * CHOICES] * 2 + [[False] * CHOICES] * 2


def test_an_even_load_loses_nothing():
    chosen = torch.arange(EXPERTS).view(4, CHOICES).repeat(5, 1)
    everyone = torch.ones(20, dtype=torch.bool)
    assert dropping(everyone, ~everyone).kept(torch.rand(20, EXPERTS), chosen).all()


def test_a_dropped_choice_weighs_nothing_and_the_others_as_before():
    model = tiny_model(**NO_ONE_SPARED)
    gate = model.model.layers[1].mlp.gate
    hidden = torch.randn(40, V2["hidden_size"])
    everyone = torch.ones(40, dtype=torch.bool)
    logits, before, experts = gate(hidden)
    limits = dropping(everyone, ~everyone)
    _, after, same_experts = gate(hidden, limits)
    kept = limits.kept(logits.softmax(dim=-1), experts)
    assert torch.equal(experts, same_experts)
    assert torch.equal(after, before * kept)
    assert 0 < kept.sum() < kept.numel()


def test_only_training_drops():
    ids, full, limited = random_ids(3, 20), tiny_model(), tiny_model(**NO_ONE_SPARED)
    assert torch.equal(limited(ids).logits, full(ids).logits)
    assert relative_error(limited.train()(ids).logits, full.train()(ids).logits) > 1e-3
    with torch.no_grad():
        # generation, or the judgement of a policy, in training mode
        assert torch.equal(limited(ids).logits, full(ids).logits)
    # one device alone has no more than its share
    alone = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    limited, full = tiny_model(**alone | NO_ONE_SPARED).train(), tiny_model(**alone).train()
    assert torch.equal(limited(ids).logits, full(ids).logits)


def test_sequences_are_spared_by_chance_and_as_a_whole():
    ids = random_ids(400, 3)
    model = tiny_model(device_capacity_factor=0.01, never_dropped_share=0.1, num_hidden_layers=2).train()
    kept = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda gate, inputs, output: kept.append(output[1] > 0))
    torch.manual_seed(0)
    model(ids)
    whole = kept[0].view(400, -1).all(dim=1)
    assert whole.sum().item() == pytest.approx(40, abs=4 * 6)
    # nearly nothing of the others fits
    assert kept[0].view(400, -1)[~whole].float().mean() < 0.05


def test_recomputed_activations_drop_the_same():
    ids, model = random_ids(4, 20), tiny_model(device_capacity_factor=0.7, never_dropped_share=0.5).train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(relative_error(*pair) < 1e-5 for pair in zip(gradients(), expected))


def test_a_config_that_drops_nothing_says_nothing_of_it():
    written = DeepseekV2Config(**V2).to_dict()
    assert not written.keys() & {"device_capacity_factor", "never_dropped_share"}
    config = DeepseekV2Config(**V2, device_capacity_factor=1.0, never_dropped_share=0.2)
    again = DeepseekV2Config.from_dict(config.to_dict())
    assert (again.device_capacity_factor, again.never_dropped_share) == (1.0, 0.2)
