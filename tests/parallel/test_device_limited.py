"""Expert parallelism in which a token travels once to each device of its experts, with shared experts meanwhile."""

import json
import math

import pytest
import torch

from deepseek_latent.compat.expert_parallel import EPImplementationInterface
from deepseek_latent.modeling_deepseek_v2 import moe_layers
from tests.parallel.experts_program import choose_first_half
from tests.parallel.launch import run
from tests.support import random_ids, relative_error, tiny_model

pytestmark = [
    pytest.mark.parallel,
    pytest.mark.skipif(EPImplementationInterface is None, reason="transformers before 5.23 has no such interface"),
]


def trained_step(tmp_path, model, batches: list[torch.Tensor], sizes: dict, **options) -> tuple[dict, list[dict]]:
    """What all processes found together, and what each found."""
    model.save_pretrained(tmp_path)
    torch.save(batches, tmp_path / "batches.pt")
    processes = math.prod(sizes.get(name, 1) for name in ("dp_replicate_size", "fsdp_size", "tp_size"))
    run("experts_program.py", tmp_path, tmp_path, json.dumps({"sizes": sizes} | options), processes=processes)
    return torch.load(tmp_path / "found.pt"), [torch.load(tmp_path / f"{i}.pt") for i in range(processes)]


def of_one_process(model, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    # as the first process draws which sequences keep all their choices
    torch.manual_seed(0)
    loss = sum(model(ids, labels=ids).loss for ids in batches) / len(batches)
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()} | {"loss": loss.detach()}


def assert_equal_to_one_process(found: dict, model, batches: list[torch.Tensor]) -> None:
    """Fails if several processes are further from float64 than twice what one process in float32 is."""
    one, exact = of_one_process(model, batches), of_one_process(model.double(), batches)
    assert found.keys() == one.keys()
    budget = 2 * max(relative_error(one[name], exact[name]) for name in exact)
    errors = {name: relative_error(found[name], exact[name]) for name in exact}
    assert max(errors.values()) <= budget, (budget, errors)


MESHES = [
    {"tp_size": 2, "ep_size": 2},
    {"fsdp_size": 4, "ep_size": 4},
    {"fsdp_size": 2, "tp_size": 2, "ep_size": 4},
    {"dp_replicate_size": 2, "fsdp_size": 2, "ep_size": 2},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_all_gradients_are_those_of_one_process(sizes, tmp_path):
    model = tiny_model(num_attention_heads=4)
    num_batches = sizes.get("fsdp_size", 1) * sizes.get("dp_replicate_size", 1)
    batches = [random_ids(2, 9, seed=i) for i in range(num_batches)]
    found, _ = trained_step(tmp_path, model, batches, sizes)
    assert_equal_to_one_process(found, model, batches)


def test_processes_may_have_unequal_batches_and_one_may_get_no_tokens_with_checkpointing(tmp_path):
    model, batches = tiny_model(), [random_ids(3, 9), random_ids(1, 5, seed=2)]
    sizes = {"fsdp_size": 2, "ep_size": 2}
    found, each = trained_step(tmp_path, model, batches, sizes, one_sided=True, checkpointing=True)
    assert [x["tokens_sent"] for x in each] == [[27, 0], [5, 0]]
    for moe in moe_layers(model).values():
        choose_first_half(moe.gate)
    assert_equal_to_one_process(found, model, batches)


def test_processes_that_share_a_batch_exempt_the_same_sequences_and_send_no_dropped_choice(tmp_path):
    model = tiny_model(num_attention_heads=4, device_capacity_factor=0.75, no_drop_fraction=0.5)
    batches = [random_ids(6, 9)]
    found, each = trained_step(tmp_path, model, batches, {"tp_size": 2, "ep_size": 2})
    # each process sends its half of the batch, and knows what the whole batch chose
    assert 0 < sum(sum(x["tokens_sent"]) for x in each) < each[0]["pairs"]
    assert_equal_to_one_process(found, model, batches)


def test_a_token_travels_once_to_each_device_of_its_experts(tmp_path):
    widths = {"hidden_size": 512, "n_routed_experts": 16, "num_experts_per_tok": 6, "n_group": 4, "topk_group": 3}
    batches = [random_ids(2, 16, seed=i) for i in range(4)]
    sizes = {"fsdp_size": 4, "ep_size": 4}
    _, each = trained_step(tmp_path, tiny_model(**widths), batches, sizes)
    for x in each:
        assert sum(x["tokens_sent"]) == x["pairs"] <= 3 * x["tokens"]
    # transformers' own sends one row in float32 for each choice, there and back, and so do gradients, in two layers
    of_choices = 6 * sum(x["tokens"] for x in each) * 4 * 512 * 4 * 2
    assert sum(x["bytes_sent"] for x in each) <= 0.51 * of_choices


def test_shared_experts_are_computed_between_start_and_wait_in_both_directions(tmp_path):
    batches = [random_ids(2, 9), random_ids(2, 9, seed=2)]
    model = tiny_model(num_hidden_layers=2)
    _, each = trained_step(tmp_path, model, batches, {"fsdp_size": 2, "ep_size": 2})
    forward = ["start", "start", "expand", "wait", "wait", "start", "project", "wait"]
    # the gradient of a wait starts an exchange, and that of a start waits for it
    backward = ["wait back", "down_proj back", "start back", "wait back", "wait back", "up_proj back"]
    for x in each:
        assert x["events"][: len(forward)] == forward
        assert x["events"][len(forward) :] == [*backward, "start back", "start back"]
