"""Operators called directly refuse what they cannot read, in one sentence, before they read anything."""

import random
import re

import pytest
import torch

from tests.support import needs_compiler

from .operator_calls import CHANGES, changed, draw, judge, places_of
from .operator_references import REFERENCES

pytestmark = needs_compiler
X, BYTES = torch.ones, torch.uint8
CODES = torch.ones(6, 4, dtype=torch.int8)
ENDS = torch.tensor([1, 3], dtype=torch.int32)
ATTEND = {"absorbed": X(2, 1, 3, 8), "q_rotary": X(2, 1, 3, 2), "latents": [X(2, 5, 8)], "rotary_keys": [X(2, 5, 2)]}
ATTEND |= {"scale": 1.0}
IN_8_BITS = {"latents": [X(2, 5, 10, dtype=BYTES)], "rotary_keys": [X(2, 5, 2).bfloat16()], "bits": "8"}
ATTENTION = ATTEND | {"q_content": X(2, 1, 3, 4), "w_uk": X(3, 4, 8), "w_uv": X(3, 6, 8)}
del ATTENTION["absorbed"]
EXPERTS = {"x": X(2, 4), "gate_up": X(3, 10, 4), "down": X(3, 4, 5), "chosen": torch.tensor([[0, 2], [1, 3]])}
EXPERTS |= {"shares": X(2, 2), "scales": [], "shared": [], "shared_scales": []}
MLP = {"x": X(2, 4), "weights": [X(5, 4), X(5, 4), X(4, 5)], "scales": []}
PROJECT = {"q_x": X(1, 2, 3), "q": X(8, 3), "q_scales": None, "x": X(1, 2, 4), "kv_a": X(5, 4), "kv_a_scales": None}
PROJECT |= {"norm": X(3), "eps": 1e-6, "cos": X(1, 2, 1), "sin": X(1, 2, 1), "head_width": 4}

BAD_CALLS = {
    "a weight of another width": ("linear", {"x": X(2, 4), "weight": X(6, 5)}, "x [m k] of sizes [*, 5], got [2, 4]"),
    "short scales": ("linear", {"x": X(2, 4), "weight": CODES, "scales": X(5)}, "got [5] with strides"),
    "short scales of rows without width": (
        "linear",
        {"x": X(2, 0), "weight": CODES[:, :0].clone(), "scales": X(2, 3)},
        "got [2, 3] with strides",
    ),
    "scales in half": ("linear", {"x": X(2, 4), "weight": CODES, "scales": X(6).half()}, "BFloat16 or Float, got Half"),
    "a weight in half": ("linear", {"x": X(2, 4), "weight": X(6, 4).half()}, "or Char, got Half"),
    "a weight that is transposed": ("linear", {"x": X(2, 4), "weight": X(4, 6).T}, "weight [n k] in one piece"),
    "tokens on meta": ("linear", {"x": X(2, 4, device="meta"), "weight": X(6, 4)}, "got them on cpu and meta"),
    "a gradient": ("linear", {"x": X(2, 4), "weight": X(6, 4, requires_grad=True)}, "call it under torch.no_grad()"),
    "ends past the last row": ("grouped", {"x": X(2, 4), "weight": X(2, 6, 4), "ends": ENDS}, "up to 2 rows, got 3"),
    "ends that decrease": ("grouped", {"x": X(3, 4), "weight": X(2, 6, 4), "ends": ENDS.flip(0)}, "got 1 after 3"),
    "ends of fewer experts": ("grouped", {"x": X(3, 4), "weight": X(3, 6, 4), "ends": ENDS}, "sizes [3], got [2]"),
    "ends in int64": ("grouped", {"x": X(3, 4), "weight": X(2, 6, 4), "ends": ENDS.long()}, "in Int, got Long"),
    "a negative expert": ("experts", EXPERTS | {"chosen": torch.tensor([[0, -1], [1, 2]])}, "got -1 for token 0"),
    "experts chosen for fewer tokens": ("experts", EXPERTS | {"chosen": torch.zeros(1, 2).long()}, "got [1, 2]"),
    "experts chosen in int32": ("experts", EXPERTS | {"chosen": torch.zeros(2, 2).int()}, "in Long, got Int"),
    "scales of experts for one weight": ("experts", EXPERTS | {"scales": [X(3, 10)]}, "each of 2 weights, got 1"),
    "an MLP without down": ("mlp", MLP | {"weights": MLP["weights"][:2]}, "gate, up and down, got 2 weights"),
    "another up": ("mlp", MLP | {"weights": [X(5, 4), X(4, 4), X(4, 5)]}, "up [f d] of sizes [5, 4], got [4, 4]"),
    "fewer heads": ("absorb", {"x": X(2, 2, 4), "w": X(3, 4, 8)}, "x [m h n] of sizes [*, 3, 4], got [2, 2, 4]"),
    "another latent": ("expand", {"x": X(2, 3, 7), "w": X(3, 6, 8)}, "x [m h c] of sizes [*, 3, 8], got [2, 3, 7]"),
    "a norm's weight that is expanded": (
        "rms_norm",
        {"x": X(2, 4), "weight": X(1).expand(4), "eps": 1e-6},
        "weight [d] in one piece, got strides [0]",
    ),
    "a number to norm": ("rms_norm", {"x": torch.tensor(1.0), "weight": X(1), "eps": 1e-6}, "rows of 1, got []"),
    "angles of another batch": ("rotate", {"x": X(3, 2, 4), "cos": X(2, 2, 2), "sin": X(2, 2, 2)}, "[3, 2, *], got"),
    "angles in float64": ("rotate", {"x": X(3, 2, 4), "cos": X(1, 2, 2).double(), "sin": X(1, 2, 2)}, "got Double"),
    "a head of width 0": ("project", PROJECT | {"head_width": 0}, "to divide the 8 rows of q, got 0"),
    "nine tokens at once": (
        "project",
        PROJECT | {"q_x": X(1, 9, 3), "x": X(1, 9, 4), "cos": X(1, 9, 1), "sin": X(1, 9, 1)},
        "at most 8 tokens, got 9",
    ),
    "a query input of other tokens": ("project", PROJECT | {"q_x": X(2, 1, 3)}, "of sizes [1, 2, *], got [2, 1, 3]"),
    "latents of another batch": ("attend", ATTEND | {"latents": [X(3, 5, 8)]}, "of sizes [2, *, 8], got [3, 5, 8]"),
    "fewer rotary keys": ("attend", ATTEND | {"rotary_keys": [X(2, 4, 2)]}, "of sizes [2, 5, 2], got [2, 4, 2]"),
    "rotary queries of fewer heads": ("attend", ATTEND | {"q_rotary": X(2, 1, 2, 2)}, "sizes [2, 1, 3, *], got"),
    "a narrow second segment": (
        "attend",
        ATTEND | {"latents": [X(2, 5, 8), X(2, 5, 7)], "rotary_keys": [X(2, 5, 2)] * 2},
        "of sizes [2, *, 8], got [2, 5, 7]",
    ),
    "codes without their scales": (
        "attend",
        ATTEND | IN_8_BITS | {"latents": [X(2, 5, 8, dtype=BYTES)]},
        "of sizes [2, *, 10], got [2, 5, 8]",
    ),
    "codes in another dtype": ("attend", ATTEND | IN_8_BITS | {"latents": [X(2, 5, 10)]}, "in Byte, got Float"),
    "an unknown format": ("attend", ATTEND | IN_8_BITS | {"bits": "7"}, "'5', '4' and 'fp8', got '7'"),
    "no latents": ("attend", ATTEND | {"latents": [], "rotary_keys": []}, "at least one, got 0 and 0"),
    "a boolean mask": ("attend", ATTEND | {"mask": X(2, 1, 1, 5, dtype=torch.bool)}, "in Float, got Bool"),
    "a short mask": ("attend", ATTEND | {"mask": X(2, 1, 1, 4)}, "[2, 3, 1, 5], got [2, 1, 1, 4]"),
    "an up-projection of fewer heads": ("attention", ATTENTION | {"w_uv": X(2, 6, 8)}, "[*, 2, 8], got"),
}  # fmt: skip


@pytest.mark.parametrize(("operator", "arguments", "message"), BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call_is_refused_by_what_was_expected_and_what_came(operator, arguments, message, operators):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(operators, operator)(**arguments)


def test_a_token_that_chooses_an_expert_twice_gets_it_twice(operators):
    chosen = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1, 1]] * 2)
    assert judge("experts", EXPERTS | {"chosen": chosen, "shares": torch.rand(2, 9)}) == "right"


def test_a_number_that_is_none_stays_none_through_an_exponential(operators):
    x = EXPERTS["x"].clone()
    x[0, 0] = torch.nan
    result = operators.experts(**EXPERTS | {"x": x})
    assert result[0].isnan().all()
    assert result[1].isfinite().all()


def test_rows_after_the_last_expert_give_zeros(operators):
    x, weight = torch.full((4, 5), torch.nan), X(2, 6, 5)
    x[:3] = 1
    assert operators.grouped(x, weight, ENDS)[:, 0].tolist() == [5, 5, 5, 0]


@pytest.mark.parametrize("operator", REFERENCES)
def test_every_change_of_an_argument_is_refused_or_computed_right(operator, operators):
    wrong, seen = [], set()
    for seed in range(2):
        source = random.Random(f"{operator} {seed}")
        arguments = draw(operator, source)
        assert judge(operator, arguments) == "right"
        for place in places_of(arguments):
            for change in CHANGES:
                other = changed(arguments, place, change, source)
                verdict = judge(operator, other) if other else "right"
                seen.add(verdict)
                wrong += [(place, change.__name__, verdict)] if verdict not in ("right", "refused") else []
    assert wrong == []
    assert "refused" in seen


@pytest.mark.parametrize("operator", REFERENCES)
def test_arguments_at_random_compute_what_torch_does(operator, operators):
    source = random.Random(operator)
    verdicts = [judge(operator, draw(operator, source)) for _ in range(40)]
    assert verdicts == ["right"] * 40
