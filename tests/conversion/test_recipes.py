"""The recipes of TransMLA and MHA2MLA that benchmarks.compression compares with are exact where they lose nothing."""

import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks import compression, mha2mla, transmla
from benchmarks.compression_rows import add_row, compared
from benchmarks.partial_rope import frequencies_of, input_moments, losses, read_layers, replaced_attention
from tests.conversion.sources import SMALL, save_source
from tests.support import random_ids, relative_error, seeded
from tests.test_examples import FOLDER as TOKENIZER

# 4 query heads, 2 key heads of width 16: 8 frequencies, and 64 cached elements
HEADS, WIDTH, CACHED = 2, 16, 64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.5 if "norm" in name else parameter * 4)
    return model


@pytest.fixture(scope="module")
def windows():
    return torch.randint(0, 96, (4, 32), generator=seeded(1))


@torch.no_grad()
def error(model, layers) -> float:
    """The relative error of the logits with another attention."""
    ids = random_ids(2, 50)
    expected = model(ids).logits
    with replaced_attention(model, layers):
        return relative_error(model(ids).logits, expected)


def transmla_layers(model, windows, *, c=None, balance=1.0, **options):
    sources, moments = read_layers(model), input_moments(model, windows)
    mixed = [transmla.mix_keys(x, m, frequencies=frequencies_of(model), **options) for x, m in zip(sources, moments)]
    layers = [transmla.partial_rope(*x) for x in zip(sources, mixed)]
    if c is None:
        return layers
    with replaced_attention(model, layers):
        moments = input_moments(model, windows)
    return [transmla.compress(*x, c=c, balance=balance) for x in zip(sources, mixed, moments)]


def mha2mla_layers(model, windows, *, selection="2-norm", num_kept=4, **options):
    options["frequencies"] = frequencies_of(model)
    return [
        mha2mla.convert(x, mha2mla.choose_frequencies(selection, products, num_kept), **options)
        for x, products in zip(read_layers(model), mha2mla.norm_products(model, windows))
    ]


def test_transmla_is_exact_if_every_component_keeps_its_rotation(model, windows):
    assert error(model, transmla_layers(model, windows, fold=1, collapse=1, rope_heads=HEADS)) < 1e-5
    assert error(model, transmla_layers(model, windows, fold=1, collapse=1)) > 1e-3


@pytest.mark.parametrize("balance", [None, 1.0, 0.3])
@pytest.mark.parametrize(("fold", "collapse"), [(1, 1), (4, 1), (2, 2), (8, 4)])
@torch.no_grad()
def test_the_second_step_of_transmla_is_exact_at_full_rank(model, windows, fold, collapse, balance):
    first = transmla_layers(model, windows, fold=fold, collapse=collapse)
    c = CACHED - WIDTH // collapse
    full, smaller = (
        transmla_layers(model, windows, fold=fold, collapse=collapse, balance=balance, c=x) for x in (c, c - 8)
    )
    ids = random_ids(2, 50)
    with replaced_attention(model, first):
        expected = model(ids).logits
    with replaced_attention(model, full):
        assert relative_error(model(ids).logits, expected) < 1e-5
    with replaced_attention(model, smaller):
        assert relative_error(model(ids).logits, expected) > 1e-4


@torch.no_grad()
def test_transmla_is_exact_for_heads_whose_keys_are_multiples_of_one_another(windows):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight.unflatten(0, (HEADS, -1))
        keys[1] = -2 * keys[0]
    assert error(model, transmla_layers(model, windows, fold=1, collapse=1)) < 1e-5
    assert error(model, transmla_layers(model, windows, fold=1, collapse=1, c=CACHED // 2, balance=None)) < 1e-5


def test_transmla_refuses_frequencies_that_it_cannot_cut_into_blocks(model, windows):
    with pytest.raises(ValueError, match="to divide each other, got 2, 1"):
        transmla_layers(model, windows, fold=1, collapse=2)


@pytest.mark.parametrize("decomposition", mha2mla.DECOMPOSITIONS)
@pytest.mark.parametrize("selection", mha2mla.SELECTIONS)
def test_mha2mla_is_exact_at_full_rotary_width_and_rank(model, windows, selection, decomposition):
    rank = {"joint": CACHED // 2, "split": CACHED}[decomposition]
    options = {"selection": selection, "decomposition": decomposition, "num_kept": WIDTH // 2}
    assert error(model, mha2mla_layers(model, windows, rank=rank, **options)) < 1e-5
    assert error(model, mha2mla_layers(model, windows, rank=rank - 8, **options)) > 1e-4


@pytest.mark.parametrize("selection", mha2mla.SELECTIONS)
def test_mha2mla_loses_something_where_a_frequency_loses_its_rotation(model, windows, selection):
    assert error(model, mha2mla_layers(model, windows, selection=selection)) > 1e-3


def test_mha2mla_decomposes_weights_exactly_at_full_rank(model, windows):
    """With half of the frequencies kept, 16 elements of keys and 32 of values remain."""
    first, joint, split = (
        mha2mla_layers(model, windows, **x) for x in ({}, {"rank": 48}, {"rank": 64, "decomposition": "split"})
    )
    for exact, *others in zip(first, joint, split):
        for other in others:
            torch.testing.assert_close(other.content_keys, exact.content_keys)
            torch.testing.assert_close(other.values, exact.values)


def test_the_selections_of_mha2mla_are_the_named_frequencies():
    products = torch.tensor([[1.0, 9.0, 2.0, 8.0], [5.0, 1.0, 6.0, 2.0]])
    chosen = {x: mha2mla.choose_frequencies(x, products, 2).tolist() for x in mha2mla.SELECTIONS}
    assert chosen == {
        "high": [[0, 1]] * 2,
        "low": [[2, 3]] * 2,
        "uniform": [[0, 2]] * 2,
        "2-norm": [[1, 3], [2, 0]],
    }
    with pytest.raises(ValueError, match="to divide 4, got 3"):
        mha2mla.choose_frequencies("uniform", products, 3)


@torch.no_grad()
def test_norm_products_are_those_of_the_queries_and_keys_of_a_head(model, windows):
    found = mha2mla.norm_products(model, windows)[0]
    attention, hidden = (
        model.model.layers[0].self_attn,
        model.model.layers[0].input_layernorm(model.model.embed_tokens(windows)),
    )
    q, k = (x(hidden).flatten(0, 1).unflatten(1, (-1, WIDTH)) for x in (attention.q_proj, attention.k_proj))
    # the second key head serves the third and the fourth query head; its frequency 5 rotates elements 5 and 13
    q, k = (x[..., [5, 13]].norm(dim=-1).mean(dim=0) for x in (q, k))
    assert found[1, 5].item() == pytest.approx(((q[2] + q[3]) * k[1]).item(), rel=1e-4)


@torch.no_grad()
def test_a_replaced_attention_is_put_back(model, windows):
    before = losses(model, windows)
    with replaced_attention(model, mha2mla_layers(model, windows)):
        assert (losses(model, windows) - before).abs().max() > 1e-3
    assert torch.equal(losses(model, windows), before)
    assert before.mean().item() == pytest.approx(model(windows, labels=windows).loss.item(), rel=1e-4)


def test_models_that_the_recipes_cannot_read_are_refused():
    with pytest.raises(ValueError, match="without biases"):
        read_layers(LlamaForCausalLM(LlamaConfig(**SMALL, attention_bias=True)))
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
    with pytest.raises(ValueError, match="without a factor"):
        read_layers(LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=yarn)))


def test_a_ratio_of_perplexities_has_the_standard_error_of_paired_losses():
    before = torch.tensor([3.0, 5.0, 4.0, 2.0]).double()
    same_change = compared(before + 0.1, before)
    assert same_change == {"perplexity": pytest.approx(36.598, rel=1e-4), "ratio": 1.10517, "standard_error": 0}
    noisy = compared(before + torch.tensor([0.1, 0.3, 0.1, 0.3]), before)
    assert noisy["standard_error"] == pytest.approx(noisy["ratio"] * (0.04 / 3) ** 0.5 / 2, rel=1e-3)


def test_rows_replace_those_of_the_same_method_and_size_and_refuse_other_texts(tmp_path):
    def row(method: str, cached: int, ratio: float) -> dict:
        texts = {"wiki": {"ratio": ratio, "standard_error": 0.1}}
        return {"method": method, "cached": cached, "fraction": cached / 64, "texts": texts}

    texts = {"wiki": {"tokens": 512, "perplexity of the source": 20.0}}
    result = {"date": "2026-11-27", "setting": {"model": "a Llama", "evaluation": texts}}
    out = tmp_path / "rows.json"
    for new in (row("mha2mla", 32, 2.0), row("ours", 32, 1.5), row("ours", 48, 1.2), row("ours", 32, 1.4)):
        add_row(result, new, out)
    rows = [(x["method"], x["cached"], x["texts"]["wiki"]["ratio"]) for x in json.loads(out.read_text())["rows"]]
    assert rows == [("ours", 48, 1.2), ("ours", 32, 1.4), ("mha2mla", 32, 2.0)]
    assert out.with_suffix(".png").exists()
    before = out.read_bytes()
    with pytest.raises(ValueError, match="choose another file"):
        add_row({"setting": {"evaluation": {"pydoc": {}}}}, row("ours", 32, 1.0), out)
    assert out.read_bytes() == before


def test_every_row_caches_as_much_as_its_size_says(tmp_path, monkeypatch, capsys):
    save_source(tmp_path / "source", LlamaConfig, vocab_size=2048, max_position_embeddings=512)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "source")
    text = (TOKENIZER / "held_out.txt").read_text()
    for name, part in (("calibration", text[:8000]), ("evaluation", text[8000:16000])):
        (tmp_path / f"{name}.txt").write_text(part)
    command = ["compression", str(tmp_path / "source"), "--calibrate", str(tmp_path / "calibration.txt"), "--evaluate"]
    command += [str(tmp_path / "evaluation.txt"), "--out", str(tmp_path / "rows.json"), "--fractions", "0.5"]
    command += ["--calibration-windows", "2", "--choosing-windows", "1", "--evaluation-windows", "2"]
    monkeypatch.setattr("sys.argv", command)
    compression.main()
    written = json.loads((tmp_path / "rows.json").read_text())
    assert written["setting"]["calibration"] == {"texts": ["calibration"], "tokens": 512}
    assert written["setting"]["evaluation"]["evaluation"]["tokens"] == 1024
    tried = [x for x in map(json.loads, capsys.readouterr().out.splitlines()) if x.get("tried", {}).get("latent")]
    for method, row in zip(("ours", "transmla", "mha2mla"), written["rows"], strict=True):
        assert (row["method"], row["cached"]) == (method, CACHED // 2)
        assert row["choice"]["rotary"] + row["choice"]["latent"] == CACHED // 2
        assert row["texts"]["evaluation"]["standard_error"] > 0
        # of all that was tried at this size, the smallest loss was chosen
        of_method = [x for x in tried if x["tried"].keys() == row["choice"].keys()]
        assert min(of_method, key=lambda x: x["loss"])["tried"] == row["choice"]
