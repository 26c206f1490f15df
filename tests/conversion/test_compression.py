"""Compression of keys and values to smaller latents is exact at full widths, and loses more at smaller ones."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from deepseek_latent.commands.__main__ import main
from deepseek_latent.conversion import calibration, target
from deepseek_latent.conversion.calibration import QUERY_STRIDE, Calibration, perplexity
from deepseek_latent.conversion.cast import Cast
from deepseek_latent.conversion.compress import CompressedMla
from deepseek_latent.conversion.compression_report import build_model, compress_and_evaluate
from deepseek_latent.conversion.gqa_to_mla import GqaToMla
from deepseek_latent.conversion.latent_basis import num_unquantized_channels
from deepseek_latent.conversion.llama_source import LlamaSource
from deepseek_latent.conversion.refine import refine
from deepseek_latent.conversion.source import Source
from deepseek_latent.conversion.text import WINDOW_LENGTH, split_into_windows
from deepseek_latent.conversion.upcycle import Upcycle
from tests.conversion.sources import LLAMA3, SMALL, SOURCES, YARN, save_source
from tests.support import NATIVE, random_ids, relative_error, seeded
from tests.test_examples import FOLDER as TOKENIZER

EXACT = ["MHA", "GQA", "MQA", "llama3", "yarn", "wide heads, tied", "all biases", "Qwen2"]
LONG = {"max_position_embeddings": WINDOW_LENGTH, "vocab_size": 2048}


def calibrated(folder: Path, config_class, **options) -> tuple[transformers.PreTrainedModel, Calibration]:
    save_source(folder, config_class, **options)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    windows = torch.randint(0, model.config.vocab_size, (6, WINDOW_LENGTH), generator=seeded(1))
    return model, Calibration(model, LlamaSource(Source(folder)), windows)


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_full_widths_lose_nothing(tmp_path, name):
    config_class, options = SOURCES[name]
    model, statistics = calibrated(tmp_path, config_class, **options)
    files, ids = Source(tmp_path), random_ids(2, 50)
    whole = CompressedMla(files, statistics, r=model.config.num_key_value_heads * _head_width(model.config))
    assert relative_error(build_model(whole)(ids).logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize("dead", ["o_proj", "v_proj", "k_proj", "q_proj"])
@torch.no_grad()
def test_a_layer_with_a_zero_projection_is_compressed_exactly(tmp_path, dead):
    save_source(tmp_path, LlamaConfig)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for layer in model.model.layers:
        getattr(layer.self_attn, dead).weight.zero_()
    model.save_pretrained(tmp_path)
    ids = random_ids(2, 50)
    statistics = Calibration(model, LlamaSource(Source(tmp_path)), torch.randint(0, 96, (6, WINDOW_LENGTH)))
    compressed_model = build_model(CompressedMla(Source(tmp_path), statistics, r=16, c=50))
    assert relative_error(compressed_model(ids).logits, model(ids).logits) < 1e-5


@torch.no_grad()
def test_directions_absent_from_the_text_are_kept_if_the_width_allows(tmp_path):
    """The text repeats one token, so the statistics have rank one."""
    save_source(tmp_path, LlamaConfig)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    statistics, ids = (
        Calibration(model, LlamaSource(Source(tmp_path)), torch.full((6, WINDOW_LENGTH), 7)),
        random_ids(2, 50),
    )
    assert (
        relative_error(build_model(CompressedMla(Source(tmp_path), statistics, r=32))(ids).logits, model(ids).logits)
        < 1e-5
    )


def _head_width(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@torch.no_grad()
def test_heads_that_attend_to_one_distance_need_no_rotation(tmp_path):
    """If a head attends to one distance only, the mean of the rotation is the rotation."""
    _, statistics = calibrated(tmp_path, LlamaConfig, num_hidden_layers=1, num_key_value_heads=1)
    own_only = [statistics[0]._replace(distances=torch.eye(WINDOW_LENGTH)[:1].repeat(4, 1))]
    conversion = CompressedMla(Source(tmp_path), own_only, r=2)
    parts = conversion.read_parts(0)
    torch.testing.assert_close(parts.means, torch.ones_like(parts.means))
    assert conversion.rotation_losses(parts).max() < 1e-12 * parts.score_costs.max()


@torch.no_grad()
def test_proportional_heads_share_one_rotation(tmp_path):
    """Four key heads that are multiples of one another keep every score with a quarter of the rotary width."""
    torch.manual_seed(0)
    save_source(tmp_path, LlamaConfig, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for layer in model.model.layers:
        keys = layer.self_attn.k_proj.weight.unflatten(0, (4, -1))
        keys.copy_(keys[:1] * torch.tensor([1.0, -0.5, 2.0, 0.3])[:, None, None])
    model.save_pretrained(tmp_path)
    statistics, ids = (
        Calibration(model, LlamaSource(Source(tmp_path)), torch.randint(0, 96, (6, WINDOW_LENGTH))),
        random_ids(2, 50),
    )
    quarter = CompressedMla(Source(tmp_path), statistics, r=16)
    assert quarter.num_kept.tolist() == [1] * 8
    assert relative_error(build_model(quarter)(ids).logits, model(ids).logits) < 1e-5
    # the latent holds only values: 4 heads of 16, the constant, and one channel to make the width even
    lossless = CompressedMla(Source(tmp_path), statistics, r=16, c=66)
    assert relative_error(build_model(lossless)(ids).logits, model(ids).logits) < 1e-5
    assert (
        relative_error(
            build_model(CompressedMla(Source(tmp_path), statistics, r=16, c=64))(ids).logits, model(ids).logits
        )
        > 1e-4
    )


@pytest.mark.parametrize("rope", [None, LLAMA3, YARN], ids=["default", "llama3", "yarn"])
@torch.no_grad()
def test_larger_widths_lose_less(tmp_path, rope):
    options = {} if rope is None else {"rope_parameters": rope}
    model, statistics = calibrated(tmp_path, LlamaConfig, num_key_value_heads=4, **options)
    files, windows = Source(tmp_path), torch.randint(0, 96, (2, 100), generator=seeded(2))
    expected = model(windows).logits

    def error(r: int, c: int | None) -> float:
        return relative_error(build_model(CompressedMla(files, statistics, r=r, c=c))(windows).logits, expected)

    by_rotation = [error(r, None) for r in (8, 24, 48, 64)]
    by_latent = [error(48, c) for c in (16, 48, 72)]
    assert by_rotation == sorted(by_rotation, reverse=True)
    assert by_latent == sorted(by_latent, reverse=True)
    assert by_rotation[-1] < 1e-5


@torch.no_grad()
def test_moments_are_those_of_the_inputs(tmp_path):
    model, _ = calibrated(tmp_path, LlamaConfig)
    windows = torch.randint(0, 96, (5, WINDOW_LENGTH), generator=seeded(3))
    found = Calibration(model, LlamaSource(Source(tmp_path)), windows)
    hidden = model(windows, output_hidden_states=True).hidden_states
    for layer, of_layer, state in zip(model.model.layers, found, hidden):
        inputs = layer.input_layernorm(state).flatten(0, 1).double()
        torch.testing.assert_close(
            of_layer.moments[:-1, :-1], inputs.T @ inputs / windows.numel(), rtol=1e-3, atol=1e-5
        )
        torch.testing.assert_close(of_layer.moments[:-1, -1], inputs.mean(dim=0), rtol=1e-3, atol=1e-5)
        assert of_layer.moments[-1, -1] == pytest.approx(1, rel=1e-4)


@pytest.fixture
def one_head(tmp_path):
    """A layer with one head, its inputs with a 1 appended [b s d+1], its statistics and its conversion."""
    save_source(tmp_path, LlamaConfig, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    windows, files = torch.randint(0, 96, (3, 7), generator=seeded(3)), Source(tmp_path)
    statistics = Calibration(model, LlamaSource(files), windows)
    layer = model.model.layers[0]
    with torch.no_grad():
        x = torch.nn.functional.pad(layer.input_layernorm(model.model.embed_tokens(windows)), (0, 1), value=1.0)
        weights = model(windows, output_attentions=True).attentions[0][:, 0]
    return layer.self_attn, x, weights, statistics[0], CompressedMla(files, statistics, r=16)


@torch.no_grad()
def test_the_cost_of_an_error_in_values_is_the_square_of_what_it_adds(one_head):
    attention, x, weights, statistics, conversion = one_head
    error = torch.randn(16, x.shape[-1], generator=seeded(1))
    # every fourth token is measured
    added = weights[:, ::QUERY_STRIDE] @ (x @ error.T) @ attention.o_proj.weight.T
    moments = statistics.value_moments[0] / statistics.value_moments[0, -1, -1]
    cost = (conversion.read_parts(0).value_forms[0] @ error.double() @ moments * error).sum()
    expected = added.square().sum(dim=-1).mean()
    torch.testing.assert_close(cost.float(), expected, rtol=1e-4, atol=0)


def test_the_cost_of_a_pair_is_the_square_of_what_its_score_adds(one_head):
    attention, x, weights, statistics, _ = one_head
    values = attention.v_proj(x[..., :-1]).detach().double()
    out = attention.o_proj.weight.detach().double()

    def returned(scores: torch.Tensor) -> torch.Tensor:
        return scores.softmax(dim=-1) @ values @ out.T

    slopes = torch.autograd.functional.jacobian(returned, weights.double().log().clamp(min=-1e4))  # [b s d b s s]
    costs = torch.einsum("bidbij->bdij", slopes).square().sum(dim=1) / weights.shape[0] / weights.shape[1]
    for distance in range(7):
        expected = costs.diagonal(-distance, dim1=1, dim2=2).sum()
        torch.testing.assert_close(statistics.distances[0, distance], expected, rtol=1e-3, atol=1e-9)
    queries = attention.q_proj(x[..., :-1]).detach().double()
    expected = torch.einsum("bi,biw,biu->wu", costs.sum(dim=2), queries, queries)
    torch.testing.assert_close(statistics.query_moments[0], expected, rtol=1e-3, atol=1e-7)
    expected = torch.einsum("bj,bjx,bjy->xy", costs.sum(dim=1), x.double(), x.double())
    torch.testing.assert_close(statistics.key_moments[0], expected, rtol=1e-3, atol=1e-7)


def test_training_a_layer_brings_it_closer_to_its_source_and_leaves_exact_layers(tmp_path):
    model, statistics = calibrated(tmp_path, LlamaConfig, num_key_value_heads=4)
    files, windows = Source(tmp_path), torch.randint(0, 96, (24, 64), generator=seeded(2))
    expected = model(windows).logits
    students = {(r, c): build_model(CompressedMla(files, statistics, r=r, c=c)) for r, c in ((16, 24), (64, None))}
    model.set_attn_implementation("sdpa")
    for (_, c), student in students.items():
        before = {name: x.clone() for name, x in student.state_dict().items()}
        began = relative_error(student(windows).logits, expected)
        refine(student, model, windows)
        changed = {name for name, x in student.state_dict().items() if not torch.equal(x, before[name])}
        if c is None:
            assert not changed
        else:
            assert relative_error(student(windows).logits, expected) < 0.8 * began
            assert {name.split(".", 3)[3] for name in changed} == {
                f"self_attn.{name}.weight" for name in ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
            }
            for i in range(len(model.model.layers)):
                row = student.model.layers[i].self_attn.kv_a_proj_with_mqa.weight[c - 1]
                assert not row.any(), "the constant channel is constant"


@torch.no_grad()
def test_a_token_without_embedding_does_not_end_the_training(tmp_path):
    model = save_source(tmp_path, LlamaConfig).eval()
    model.model.embed_tokens.weight[0] = 0
    model.save_pretrained(tmp_path)
    windows = torch.randint(0, 96, (16, 40), generator=seeded(2))
    windows[:, 0] = 0
    student = build_model(GqaToMla(Source(tmp_path)))
    for layer in student.model.layers:
        layer.self_attn.o_proj.weight.mul_(0.9)
    expected = model(windows).logits
    began = relative_error(student(windows).logits, expected)
    refine(student, model, windows)
    assert relative_error(student(windows).logits, expected) < 0.8 * began


def test_a_model_whose_statistics_do_not_fit_together_is_compressed_in_parts(source, tmp_path, monkeypatch):
    text = (tmp_path / "text.txt").read_text()
    whole, report = compress_and_evaluate(Source(source), r=16, c=16, texts=[text])
    monkeypatch.setattr(calibration, "MAX_STATISTICS_BYTES", 1)
    in_parts, report_in_parts = compress_and_evaluate(Source(source), r=16, c=16, texts=[text])
    assert report_in_parts == report
    for one, other in zip(whole.pieces(), in_parts.pieces()):
        torch.testing.assert_close(one.make(), other.make(), rtol=0, atol=0)


@torch.no_grad()
def test_perplexity_is_the_exponential_of_the_mean_loss(tmp_path):
    model = save_source(tmp_path, LlamaConfig)
    windows = random_ids(6, 40)
    assert perplexity(model, windows) == pytest.approx(model(windows, labels=windows).loss.exp().item(), rel=1e-4)


@pytest.fixture
def source(tmp_path):
    """A Llama with a tokenizer, and a text to calibrate on."""
    save_source(tmp_path / "source", LlamaConfig, **LONG)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(tmp_path / "source")
    (tmp_path / "text.txt").write_text((TOKENIZER / "held_out.txt").read_text())
    return tmp_path / "source"


def test_held_out_windows_are_not_calibration_windows(source, tmp_path):
    text = (tmp_path / "text.txt").read_text()
    calibration, held_out = split_into_windows(source, text)
    assert calibration.shape[1] == held_out.shape[1] == WINDOW_LENGTH
    assert not {tuple(x) for x in calibration.tolist()} & {tuple(x) for x in held_out.tolist()}
    with pytest.raises(ValueError, match="at least 1,280 tokens"):
        split_into_windows(source, text, text[:1000])


def test_every_text_has_an_equal_share_of_the_windows(source, tmp_path):
    text = (tmp_path / "text.txt").read_text()
    long, short = text * 8, text[len(text) // 2 :]
    calibration, held_out = split_into_windows(source, long, short)
    for windows, most in ((calibration, 64), (held_out, 16)):
        of_short = split_into_windows(source, short)[windows is held_out]
        assert len(of_short) < most
        torch.testing.assert_close(windows[most:], of_short, rtol=0, atol=0)


def test_the_command_reports_every_step_and_writes_the_model_it_evaluated(source, tmp_path, capsys):
    widths = ["--kv-lora-rank", "16", "--qk-rope-head-dim", "16", "--calibrate", str(tmp_path / "text.txt")]
    out = tmp_path / "out"
    assert main(["convert", "gqa-to-mla", str(source), str(out), *widths, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["cached elements per token"] == 3 * 32
    assert report["cached elements per token before"] == 3 * 64
    _, held_out = split_into_windows(source, (tmp_path / "text.txt").read_text())
    evaluated = {
        "perplexity of the source": AutoModelForCausalLM.from_pretrained(source),
        "perplexity with rotary keys of 16 and latents of 16": AutoModelForCausalLM.from_pretrained(out),
    }
    for name, model in evaluated.items():
        assert report[name] == pytest.approx(perplexity(model.eval(), held_out), rel=1e-4)
    card = (out / "README.md").read_text()
    assert f"| perplexity of the source | {report['perplexity of the source']:.4g} |" in card
    # the channels that quantized caches keep in bfloat16, also if experts are made of the result
    assert model.config.num_unquantized_channels == num_unquantized_channels(16) == 8
    experts = Upcycle(Cast(Source(out), None), "M2", e=2, shared=0, k=1, groups=1)
    assert experts.config.num_unquantized_channels == 8
    stock = NATIVE.DeepseekV2ForCausalLM.from_pretrained(out)
    assert perplexity(stock.eval(), held_out) == pytest.approx(
        report["perplexity with rotary keys of 16 and latents of 16"], rel=1e-4
    )


def test_an_interrupted_conversion_is_not_resumed_with_another_text(source, tmp_path, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    command = ["convert", "gqa-to-mla", str(source), str(out), "--kv-lora-rank", "16", "--qk-rope-head-dim", "16"]
    command += ["--calibrate", str(text), "--max-shard-size", "100KB"]
    written = []

    def write_one(path, pieces, progress):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write_shard(path, pieces, progress)

    write_shard = target._write_shard
    monkeypatch.setattr(target, "_write_shard", write_one)
    assert main(command) == 130
    monkeypatch.setattr(target, "_write_shard", write_shard)
    half = text.read_text()[: len(text.read_text()) // 2]
    text.write_text(half)
    assert main(command) == 0
    _, report = compress_and_evaluate(Source(source), r=16, c=16, texts=[half])
    _, held_out = split_into_windows(source, half)
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    assert perplexity(model, held_out) == pytest.approx(
        report["perplexity with rotary keys of 16 and latents of 16"], rel=1e-4
    )


def test_in_bfloat16_compression_at_full_width_keeps_the_perplexity(tmp_path, source):
    """A width that is not a square makes the norm's weight round, which `kv_b_proj` compensates for."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    text = (tmp_path / "text.txt").read_text()
    conversion, report = compress_and_evaluate(Source(source), r=32, c=34, texts=[text])
    assert conversion.config.dtype == torch.bfloat16
    before = report["perplexity of the source"]
    assert report["perplexity with rotary keys of 32 and latents of 34"] == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--kv-lora-rank", "16"], "add --qk-rope-head-dim and --calibrate"),
        (["--kv-lora-rank", "16", "--qk-rope-head-dim", "15", "--calibrate", "text.txt"], "must be even and 2 to 32"),
        (["--kv-lora-rank", "60", "--qk-rope-head-dim", "16", "--calibrate", "text.txt"], "must be even and 2 to 50"),
        (["--kv-lora-rank", "8", "--qk-rope-head-dim", "8", "--calibrate", "none.txt"], "which does not exist"),
        (
            ["--kv-lora-rank", "8", "--qk-rope-head-dim", "8", "--calibrate", "text.txt", "--bias-free"],
            "--bias-free is for an exact conversion",
        ),
    ],
    ids=str,
)
def test_impossible_widths_are_refused_in_one_sentence(source, tmp_path, capsys, monkeypatch, options, sentence):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "gqa-to-mla", str(source), str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert sentence in error.splitlines()[-1]
    assert "calibrating" not in error
    assert not (tmp_path / "out").exists()


def test_a_source_without_a_tokenizer_cannot_be_calibrated(tmp_path, capsys):
    save_source(tmp_path / "source", LlamaConfig, **SMALL)
    (tmp_path / "text.txt").write_text("a text")
    widths = ["--kv-lora-rank", "8", "--qk-rope-head-dim", "8", "--calibrate", str(tmp_path / "text.txt")]
    assert main(["convert", "gqa-to-mla", str(tmp_path / "source"), str(tmp_path / "out"), *widths]) == 2
    assert "expected tokenizer.json" in capsys.readouterr().err
