"""The card that peft writes beside an adapter says in which programs the adapter acts as trained."""

import pytest
from huggingface_hub import ModelCard
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

from deepseek_latent import lora_config
from tests.compat.helpers import linear
from tests.support import tiny_model

HEADING = "## Where this adapter acts"


def section_of(folder) -> str:
    text = ModelCard.load(folder / "README.md").text
    assert text.count(HEADING) == 1
    return text.partition(HEADING)[2].partition("\n## ")[0]


def rows_of(section: str) -> dict[str, str]:
    """What has no effect, by program."""
    rows = [line.split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    return {program.removeprefix("| "): dropped for program, dropped, _ in rows}


def saved(folder, config, model=None) -> str:
    model = get_peft_model(tiny_model() if model is None else model, config)
    model.save_pretrained(folder)
    return section_of(folder)


def test_the_card_names_targets_without_effect_in_other_programs(tmp_path):
    section = saved(tmp_path, lora_config(tiny_model(), routed_experts=True))
    experts, mlps = "`experts.down_proj`, `experts.gate_up_proj`", "`down_proj`, `gate_proj`, `up_proj`"
    assert rows_of(section) == {
        "transformers and peft without deepseek_latent": mlps,
        "vLLM": "`kv_b_proj`",
        "vLLM, without options for them": experts,
        "llama.cpp": f"{experts}, `kv_a_proj_with_mqa`, `kv_b_proj`, `q_a_proj`, `q_b_proj`",
    }
    for advice in ("import deepseek_latent before the model is loaded", 'serve_with="vllm"', "merge_and_unload()"):
        assert advice in section


def test_the_card_says_where_all_targets_act(tmp_path):
    section = saved(tmp_path, LoraConfig(target_modules=["o_proj"]))
    assert rows_of(section) == {}
    expected = (
        "`o_proj`. Plain LoRA on these targets acts in transformers and peft without deepseek_latent, vLLM, llama.cpp"
    )
    assert expected in section


def test_the_card_claims_nothing_of_targets_that_were_not_examined(tmp_path):
    section = saved(tmp_path, LoraConfig(target_modules=["o_proj", "embed_tokens"]))
    assert "on `embed_tokens`, `o_proj`." in section
    assert "vLLM" not in section


def test_targets_given_as_a_pattern_are_named_as_well(tmp_path):
    section = saved(tmp_path, LoraConfig(target_modules=r".*layers\.0\.self_attn\.kv_b.*"))
    assert rows_of(section)["vLLM"] == "`kv_b_proj`"


def test_what_peft_writes_stays_and_saving_again_keeps_one_section(tmp_path):
    config = lora_config(tiny_model())
    saved(tmp_path, config)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "peft"
    assert "## Model Details" in card.text
    assert "- PEFT" in card.text
    card.text = card.text.replace("## Model Details", "## Details of mine")
    card.save(tmp_path / "README.md")
    assert rows_of(saved(tmp_path, LoraConfig(target_modules=["kv_b_proj"]))).keys() == {"vLLM", "llama.cpp"}
    text = ModelCard.load(tmp_path / "README.md").text
    assert "## Details of mine" in text
    assert "- PEFT" in text


def test_a_loaded_adapter_is_described_when_it_is_saved_again(tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    section = saved(first, lora_config(tiny_model(), serve_with="vllm"))
    PeftModel.from_pretrained(tiny_model(), first).save_pretrained(again)
    assert section_of(again) == section


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (nn.Sequential(linear()), LoraConfig(target_modules=["0"])),
        (tiny_model(), IA3Config(target_modules=["o_proj"], feedforward_modules=[])),
    ],
    ids=["another model", "another method"],
)
def test_cards_of_other_adapters_are_left_to_peft(model, config, tmp_path):
    get_peft_model(model, config).save_pretrained(tmp_path)
    assert HEADING not in (tmp_path / "README.md").read_text()
