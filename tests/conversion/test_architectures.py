"""Other architectures than Llama become latent attention exactly, or are refused with the reason."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.conversion.architectures import PUBLISHED, save_published
from tests.conversion.sources import convert_to_mla
from tests.support import NATIVE, random_ids, relative_error


def logits_while_generating(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """The logits of each of 20 greedy tokens [20 b vocab], all but the first computed from cached tokens."""
    greedy = {"do_sample": False, "num_beams": 1, "eos_token_id": None, "pad_token_id": 0}
    output = model.generate(ids, max_new_tokens=20, output_logits=True, return_dict_in_generate=True, **greedy)
    return torch.stack(output.logits)


@pytest.mark.parametrize("name", PUBLISHED)
@torch.no_grad()
def test_a_published_architecture_gives_the_same_logits_with_and_without_a_cache(tmp_path, name):
    source, ids = save_published(tmp_path / "source", name), random_ids(2, 50)
    expected, expected_while_generating = source(ids).logits, logits_while_generating(source, ids)
    out = convert_to_mla(tmp_path / "source", tmp_path / "out")
    for model_class in (AutoModelForCausalLM, NATIVE.DeepseekV2ForCausalLM):
        model = model_class.from_pretrained(out, trust_remote_code=False)
        assert relative_error(model(ids).logits, expected) < 1e-5, model_class
        assert relative_error(logits_while_generating(model, ids), expected_while_generating) < 1e-5, model_class
