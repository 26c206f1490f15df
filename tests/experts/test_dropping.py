"""Devices with more choices than their capacity drop those of lowest affinity, and only in training."""

import pytest
import torch

from deepseek_latent import DeepseekV2Config
from deepseek_latent.experts.dropping import TokenDropping
from tests import reference
from tests.support import V2, random_ids, relative_error, tiny_model

DEVICES, EXPERTS, CHOICES = 4, 12, 3
NO_ONE_SPARED = {"device_capacity_factor": 1.0, "no_drop_fraction": 0.0}


def uneven_routing(num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    scores = (torch.randn(num_tokens, EXPERTS) * 2 + torch.linspace(0, 3, EXPERTS)).softmax(dim=-1)
    return scores, scores.topk(CHOICES).indices


def dropping(is_token: torch.Tensor, is_exempt: torch.Tensor, factor: float = 1.0) -> TokenDropping:
    return TokenDropping(is_token, is_exempt, DEVICES, factor)


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("num_exempt", [0, 5, 19])
def test_dropped_choices_are_those_of_the_paper(num_exempt, factor):
    torch.manual_seed(2)
    scores, chosen = uneven_routing(19)
    is_exempt = torch.arange(19) < num_exempt
    kept = dropping(torch.ones(19, dtype=torch.bool), is_exempt, factor).kept(scores, chosen)
    options = {"num_devices": DEVICES, "capacity_factor": factor}
    expected = reference.dropped_choices(scores, chosen, set(range(num_exempt)), **options)
    assert {(t, chosen[t, slot].item()) for t, slot in (~kept).nonzero().tolist()} == expected
    assert bool(expected) == (num_exempt < 19)


def test_padding_uses_no_capacity():
    torch.manual_seed(2)
    scores, chosen = uneven_routing(20)
    is_token = torch.arange(20) % 3 != 0
    kept = dropping(is_token, torch.zeros(20, dtype=torch.bool)).kept(scores, chosen)
    num_tokens = int(is_token.sum())
    alone = dropping(torch.ones(num_tokens, dtype=torch.bool), torch.zeros(num_tokens, dtype=torch.bool))
    assert torch.equal(kept[is_token], alone.kept(scores[is_token], chosen[is_token]))
    assert not kept[is_token].all()


def test_padding_of_an_exempt_row_is_dropped():
    chosen = torch.zeros(4, CHOICES, dtype=torch.long) + torch.arange(CHOICES)
    is_token = torch.tensor([True, True, False, False])
    limits = TokenDropping(is_token, torch.tensor([False, False, True, True]), DEVICES, 4.0)
    assert limits.kept(torch.rand(4, EXPERTS), chosen).tolist() == [[True] * CHOICES] * 2 + [[False] * CHOICES] * 2


def test_an_even_load_drops_nothing():
    chosen = torch.arange(EXPERTS).view(4, CHOICES).repeat(5, 1)
    all_tokens = torch.ones(20, dtype=torch.bool)
    assert dropping(all_tokens, ~all_tokens).kept(torch.rand(20, EXPERTS), chosen).all()


def test_dropped_choices_get_the_weight_0_and_the_others_keep_theirs():
    model = tiny_model(**NO_ONE_SPARED)
    gate = model.model.layers[1].mlp.gate
    hidden = torch.randn(40, V2["hidden_size"])
    all_tokens = torch.ones(40, dtype=torch.bool)
    logits, before, experts = gate(hidden)
    limits = dropping(all_tokens, ~all_tokens)
    _, after, same_experts = gate(hidden, limits)
    kept = limits.kept(logits.softmax(dim=-1), experts)
    assert torch.equal(experts, same_experts)
    assert torch.equal(after, before * kept)
    assert 0 < kept.sum() < kept.numel()


def test_choices_are_dropped_only_in_training():
    ids, full, limited = random_ids(3, 20), tiny_model(), tiny_model(**NO_ONE_SPARED)
    assert torch.equal(limited(ids).logits, full(ids).logits)
    assert relative_error(limited.train()(ids).logits, full.train()(ids).logits) > 1e-3
    with torch.no_grad():
        # generation, or evaluation of a policy, in training mode
        assert torch.equal(limited(ids).logits, full(ids).logits)
    # a single device never has more than its even share
    alone = {"topk_method": "greedy", "n_group": 1, "topk_group": 1}
    limited, full = tiny_model(**alone | NO_ONE_SPARED).train(), tiny_model(**alone).train()
    assert torch.equal(limited(ids).logits, full(ids).logits)


def test_whole_sequences_are_exempt_at_random():
    ids = random_ids(400, 3)
    model = tiny_model(device_capacity_factor=0.01, no_drop_fraction=0.1, num_hidden_layers=2).train()
    kept = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda gate, inputs, output: kept.append(output[1] > 0))
    torch.manual_seed(0)
    model(ids)
    is_whole = kept[0].view(400, -1).all(dim=1)
    assert is_whole.sum().item() == pytest.approx(40, abs=4 * 6)
    # of the other sequences, nearly no choice fits
    assert kept[0].view(400, -1)[~is_whole].float().mean() < 0.05


def test_recomputed_activations_drop_the_same():
    ids, model = random_ids(4, 20), tiny_model(device_capacity_factor=0.7, no_drop_fraction=0.5).train()

    def gradients():
        model.zero_grad()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(relative_error(*pair) < 1e-5 for pair in zip(gradients(), expected))


def test_a_config_that_drops_nothing_is_written_without_these_fields():
    written = DeepseekV2Config(**V2).to_dict()
    assert not written.keys() & {"device_capacity_factor", "no_drop_fraction"}
    config = DeepseekV2Config(**V2, device_capacity_factor=1.0, no_drop_fraction=0.2)
    again = DeepseekV2Config.from_dict(config.to_dict())
    assert (again.device_capacity_factor, again.no_drop_fraction) == (1.0, 0.2)
