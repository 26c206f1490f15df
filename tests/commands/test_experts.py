"""`deepseek-latent experts` reports what the gates of a model choose on a text."""

import json
import math
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deepseek_latent import DeepseekV2Config
from deepseek_latent.commands.__main__ import main
from deepseek_latent.commands.expert_plot import draw_loads
from deepseek_latent.conversion.text import read_text, tokenize
from deepseek_latent.finetuning.activity import Activity, activity_of, activity_of_halves
from deepseek_latent.finetuning.expert_selection import ExpertSelection, expert_scores, select_experts
from tests.support import random_ids, tiny_model
from tests.test_examples import FOLDER


@torch.no_grad()
def test_shares_and_weights_are_those_of_the_gates():
    model, ids = tiny_model(), random_ids(2, 1500)
    found = activity_of(model, ids)
    assert found.layers == [1, 2]
    assert not any(module._forward_hooks for module in model.modules())
    hidden = model(ids[:, :1024], output_hidden_states=True, use_cache=False).hidden_states
    seen = []
    model.model.layers[1].mlp.gate.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for window in ids.split(1024, dim=1):
        model(window, use_cache=False)
    assert hidden[0].shape[1] == 1024
    weights, experts = (torch.cat([output[i] for output in seen]) for i in (1, 2))
    for expert in range(12):
        chosen = experts == expert
        assert found.shares[0, expert] == pytest.approx((chosen.sum() / experts.numel()).item())
        expected = weights[chosen].mean().item() if chosen.any() else 0.0
        assert found.weights[0, expert] == pytest.approx(expected, rel=1e-4)


def test_load_entropy_and_distance_follow_from_the_shares():
    def of(*rows):
        shares = torch.tensor(rows, dtype=torch.float64)
        return Activity(list(range(len(rows))), shares, torch.zeros_like(shares), torch.zeros_like(shares))

    activity = of([0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0])
    assert activity.load().tolist() == [1, 4, 2]
    assert activity.entropy().tolist() == pytest.approx([1, 0, 0.5])
    assert activity.unused().tolist() == [0, 3, 2]
    other = of([0.25, 0.25, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0])
    assert activity.distance(other).tolist() == [0, 1, 0.5]


def test_routers_of_zeros_are_named_and_no_law_of_trained_models_is_printed(tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    for layer in model.model.layers[1:]:
        torch.nn.init.zeros_(layer.mlp.gate.weight)
    model.save_pretrained(tmp_path / "tied")
    AutoTokenizer.from_pretrained(FOLDER).save_pretrained(tmp_path / "tied")
    text = tmp_path / "text.txt"
    text.write_text("import os\n" * 40)
    assert main(["experts", str(tmp_path / "tied"), "--text", str(text)]) == 0
    printed = capsys.readouterr()
    assert "all routers are zero: every token gets the same experts" in printed.err
    assert "2202.01169" not in printed.out
    assert main(["experts", str(tmp_path / "tied"), "--text", str(text), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scaling_law"] is None


def test_a_model_without_experts_is_refused():
    with pytest.raises(ValueError, match="expected a model with experts"):
        activity_of(tiny_model(n_routed_experts=None), random_ids(1, 5))


def test_the_command_reports_and_draws_the_choices(tmp_path, capsys):
    text, other = FOLDER / "held_out.txt", tmp_path / "other.txt"
    other.write_text("1 2 3 4 5 6 7 8 9 10 " * 40)
    command = ["experts", str(FOLDER), "--text", str(text), "--against", str(other)]
    assert main([*command, "--plot", str(tmp_path / "plot.png"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [row["layer"] for row in report["layers"]] == [1, 2, 3]
    for row in report["layers"]:
        assert sum(row["shares"]) == pytest.approx(1)
        assert row["load"] == pytest.approx(16 * max(row["shares"]))
        assert 0 < row["distance"] < 1
        assert row["unused"] == row["shares"].count(0)
        assert row["entropy"] == pytest.approx(-sum(x * math.log(x) for x in row["shares"] if x) / math.log(16))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--esft", str(tmp_path), "--threshold", "0.3"]) == 0
    chosen = ExpertSelection.load(tmp_path).experts
    for row in report["layers"]:
        scores = [row["shares"][expert] for expert in chosen[row["layer"]]]
        assert sum(scores) >= 0.3 > sum(scores[:-1])
    printed, num_chosen = capsys.readouterr(), sum(len(experts) for experts in chosen.values())
    assert "2202.01169" in printed.out
    assert re.search(r"^reading [\d,]+ tokens of held_out\.txt \.\.\.$", printed.err, re.MULTILINE)
    assert f"{num_chosen} of 48 experts to fine-tune written to {tmp_path}" in printed.err


def test_the_command_says_whether_texts_differ_more_than_halves_of_one_text(tmp_path, capsys):
    """The same text twice uses the same experts; numbers use others than prose; too short a text says nothing."""
    prose, again, numbers, short = (tmp_path / name for name in ("prose.txt", "again.txt", "numbers.txt", "short.txt"))
    for file in (prose, again):
        file.write_text((FOLDER / "held_out.txt").read_text()[:9000])
    numbers.write_text("1 2 3 4 5 6 7 8 9 10 " * 300)
    short.write_text("a text")
    command = ["experts", str(FOLDER), "--text", str(prose), "--against", str(again), str(numbers), str(short)]
    assert main([*command, "--plot", str(tmp_path / "plot.png")]) == 0
    printed = capsys.readouterr().out
    sentences = {line.split(" differ by")[0].split(": ")[0]: line for line in printed.splitlines() if " and " in line}
    assert sentences["choices on halves of prose.txt and again.txt"].endswith("no specialization on these texts.")
    for other in ("prose.txt", "again.txt"):
        assert sentences[f"choices on halves of {other} and numbers.txt"].endswith("use different experts.")
        assert "too few to tell" in sentences[f"{other} and short.txt"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["comparisons"]) == 6
    same, different = report["comparisons"][:2]
    assert 0 < same["between"] == pytest.approx(same["within"] / 2)
    assert same["within"] < different["between"]
    for row in report["layers"]:
        assert row["distance"] == row["distances"][0] == 0 < row["distances"][1]


@pytest.mark.parametrize("uneven", [0.0, 0.05, 0.125], ids="uneven{}".format)
def test_the_map_is_white_at_an_even_load_and_black_where_an_expert_is_never_chosen(uneven):
    shares = torch.full((2, 8), 0.125, dtype=torch.float64)
    shares[1, :2] += torch.tensor([uneven, -uneven])
    zeros = torch.zeros_like(shares)
    figure = draw_loads([("text", Activity([1, 2], shares, zeros, zeros))])
    (image,) = figure.axes[0].images
    colors = image.to_rgba(image.get_array())[..., :3]
    assert colors[0].min() > 0.95
    assert colors[1, 2:].min() > 0.95
    more, less = colors[1, 0], colors[1, 1]
    if uneven == 0:
        assert min(more.min(), less.min()) > 0.95
    else:
        assert more[0] > more[2] + 0.1
        assert less.max() == 0 if uneven == 0.125 else less[2] > less[1] + 0.05


@pytest.mark.parametrize("length", [2048, 4200])
def test_halves_of_a_text_add_up_to_the_whole(length):
    model, ids = tiny_model(), random_ids(1, length)
    whole, first, second = activity_of_halves(model, ids)
    expected = activity_of(model, ids)
    middle = length // 1024 // 2 * 1024
    for found, alone in ((whole, expected), (first, activity_of(model, ids[:, :middle]))):
        torch.testing.assert_close(found.shares, alone.shares)
        torch.testing.assert_close(found.weights, alone.weights)
        torch.testing.assert_close(found.gates, alone.gates)
    torch.testing.assert_close((middle * first.shares + (length - middle) * second.shares) / length, whole.shares)


def test_a_text_of_less_than_two_windows_has_no_halves():
    with pytest.raises(ValueError, match="at least 2,048 tokens"):
        activity_of_halves(tiny_model(), random_ids(1, 2047))


@pytest.mark.parametrize("by", ["token", "gate"])
def test_each_way_of_scoring_has_the_threshold_of_the_paper(tmp_path, by):
    text = FOLDER / "held_out.txt"
    assert main(["experts", str(FOLDER), "--text", str(text), "--esft", str(tmp_path), "--by", by]) == 0
    model = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    scores = expert_scores(activity_of(model, tokenize(FOLDER, read_text(text))), by)
    expected = select_experts(scores, {"token": 0.2, "gate": 0.1}[by])
    assert ExpertSelection.load(tmp_path).experts == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--text", "none.txt"], "none.txt"),
        (["--text", "empty.txt"], "empty.txt, which is empty"),
        (["--text", "text.txt", "--esft", "nowhere/expert_cfg.json"], "expected a folder to write into"),
        (["--text", "text.txt", "--plot", "nowhere/plot.png"], "expected a folder to write into"),
        (["--text", "text.txt", "--plot", "plot.pdf"], "expected a name that ends with .png, got plot.pdf"),
        (["--text", "text.txt", "--plot", "."], "expected a file for --plot, got the folder"),
        (["--text", "text.txt", "--by", "token"], "--by and --threshold say how --esft chooses"),
        (["--text", "text.txt", "--threshold", "0.2"], "give --esft a file to write, or leave them"),
    ],
    ids=str,
)
def test_unusable_input_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "empty.txt").write_text("\n")
    assert main(["experts", str(FOLDER), *options]) == 2
    assert words in capsys.readouterr().err


def test_a_model_on_the_hub_is_downloaded(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("deepseek_latent.conversion.places.snapshot_download", lambda repo, allow_patterns: str(FOLDER))
    config = DeepseekV2Config.from_pretrained(FOLDER)
    monkeypatch.setattr("deepseek_latent.commands.experts.read_config", lambda source: config)
    (tmp_path / "text.txt").write_text("a text")
    assert main(["experts", "somebody/deepseek", "--text", str(tmp_path / "text.txt")]) == 0
    assert "16 experts" in capsys.readouterr().out


@pytest.mark.parametrize("ids", [torch.empty(1, 0, dtype=torch.long)])
def test_an_empty_text_is_refused(ids):
    with pytest.raises(ValueError, match="at least one token"):
        activity_of(tiny_model(), ids)


def test_a_model_without_a_head_is_read_too():
    assert activity_of(tiny_model().model, random_ids(1, 5)).layers == [1, 2]


def test_a_model_without_a_tokenizer_is_refused(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("a text")
    assert main(["experts", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt")]) == 2
    assert "expected tokenizer.json" in capsys.readouterr().err
    assert AutoTokenizer.from_pretrained(FOLDER) is not None
