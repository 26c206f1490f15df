"""A model class has what users of transformers expect: heads, training, compilation, resizing, generation."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    StaticCache,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_layers import GenericForSequenceClassification, GenericForTokenClassification

import deepseek_latent
from deepseek_latent import DeepseekV2Config, LatentCache
from deepseek_latent.modeling_deepseek_v2 import DeepseekV2PreTrainedModel
from tests.support import V2, native_twin, random_ids, relative_error, tiny_model

GREEDY = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("auto", "own"),
    [
        (AutoModel, "DeepseekV2Model"),
        (AutoModelForCausalLM, "DeepseekV2ForCausalLM"),
        (AutoModelForSequenceClassification, "DeepseekV2ForSequenceClassification"),
        (AutoModelForTokenClassification, "DeepseekV2ForTokenClassification"),
    ],
)
def test_every_auto_class_gives_our_class_with_our_backbone(auto, own):
    model = auto.from_config(DeepseekV2Config(**V2))
    assert type(model) is getattr(deepseek_latent, own)
    assert type(model.base_model) is deepseek_latent.DeepseekV2Model


@pytest.mark.parametrize(
    ("generic", "auto"),
    [
        (GenericForSequenceClassification, AutoModelForSequenceClassification),
        (GenericForTokenClassification, AutoModelForTokenClassification),
    ],
)
def test_classifiers_have_the_parameters_of_transformers_generic_ones(generic, auto):
    config = DeepseekV2Config(**V2 | {"num_labels": 5})
    theirs = type("Theirs", (generic, DeepseekV2PreTrainedModel), {})(config)
    shapes = {name: x.shape for name, x in auto.from_config(config).named_parameters()}
    assert shapes == {name: x.shape for name, x in theirs.named_parameters()}


def test_generate_uses_a_latent_cache_by_default():
    model, ids = tiny_model(), random_ids(2, 9)
    output = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert type(output.cache) is LatentCache
    assert output.cache.get_seq_length() == 9 + 12 - 1


def test_a_bare_forward_makes_a_latent_cache():
    model, ids = tiny_model(), random_ids(2, 9)
    assert type(model(ids, use_cache=True).cache) is LatentCache
    assert model(ids, use_cache=False).cache is None


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 3},
        {"prefill_chunk_size": 4},
        {"cache_implementation": "static"},
    ],
    ids=str,
)
def test_generation_with_a_cache_equals_generation_without_one(options):
    model, ids = tiny_model(), random_ids(1, 10)
    expected = model.generate(
        ids, **GREEDY, **{k: v for k, v in options.items() if k.startswith("num_")}, use_cache=False
    )
    assert torch.equal(model.generate(ids, **GREEDY, **options), expected)


def test_sampling_draws_the_same_tokens_with_and_without_a_cache():
    model, ids = tiny_model(), random_ids(3, 10)
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, **GREEDY | {"do_sample": True}, use_cache=use_cache))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("cache", [DynamicCache, lambda: LatentCache(DeepseekV2Config(**V2))])
def test_a_cache_that_the_user_passes_is_used(cache):
    model, ids = tiny_model(), random_ids(1, 10)
    given = cache()
    output = model.generate(ids, **GREEDY, cache=given, return_dict_in_generate=True)
    assert output.cache is given
    assert torch.equal(output.sequences, model.generate(ids, **GREEDY))


def test_generation_from_left_padded_prompts_equals_each_alone():
    model, ids = tiny_model(), random_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    both = model.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(both[0], model.generate(ids[:1], **GREEDY)[0])
    assert torch.equal(both[1, 4:], model.generate(ids[1:, 4:], **GREEDY)[0])


def test_classification_reads_the_last_token_that_is_not_padding():
    config = DeepseekV2Config(**V2, num_labels=5, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = random_ids(2, 9)
    ids[1, 6:] = 0
    logits = model(ids, attention_mask=(ids != 0).long()).logits
    assert logits.shape == (2, 5)
    assert relative_error(logits[1], model(ids[1:, :6]).logits[0]) < 1e-5
    assert model(ids, labels=torch.tensor([0, 3])).loss.isfinite()


def test_token_classification_gives_a_label_and_a_loss_per_token():
    model = AutoModelForTokenClassification.from_config(DeepseekV2Config(**V2, num_labels=4)).eval()
    ids = random_ids(2, 9)
    output = model(ids, labels=torch.zeros_like(ids))
    assert output.logits.shape == (2, 9, 4)
    expected = torch.nn.functional.cross_entropy(output.logits.flatten(0, 1), torch.zeros(18, dtype=torch.long))
    torch.testing.assert_close(output.loss, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    model, ids = tiny_model().train(), random_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, plain[name]) < 1e-5, name


def test_every_parameter_gets_a_gradient():
    model, ids = tiny_model().train(), random_ids(8, 40)
    model(ids, labels=ids).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without


def test_tied_embeddings_are_one_tensor():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tiny_model().lm_head.weight is not tiny_model().model.embed_tokens.weight


@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings_keep_the_old_rows(tied):
    model, ids = tiny_model(tie_word_embeddings=tied), random_ids(2, 9)
    before = model(ids).logits
    model.resize_token_embeddings(104, mean_resizing=False)
    assert model.config.vocab_size == 104
    after = model(ids).logits
    assert after.shape[-1] == 104
    assert relative_error(after[..., :96], before) < 1e-6


@pytest.mark.parametrize("kept", [0, 1, 3, torch.tensor([0, 4])], ids=str)
def test_logits_to_keep_are_those_positions(kept):
    model, ids = tiny_model(), random_ids(2, 9)
    positions = kept if isinstance(kept, torch.Tensor) else slice(-kept, None)
    assert relative_error(model(ids, logits_to_keep=kept).logits, model(ids).logits[:, positions]) < 1e-6


def test_loss_is_the_mean_cross_entropy_of_the_next_token():
    model, ids = tiny_model(), random_ids(2, 9)
    labels = ids.clone()
    labels[0, :5] = -100
    logits = model(ids).logits.float()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)


def test_embeddings_instead_of_ids_give_the_same():
    model, ids = tiny_model(), random_ids(2, 9)
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, model(ids).logits)


@pytest.mark.parametrize(
    "given", [{}, {"input_ids": torch.ones(1, 2, dtype=torch.long), "inputs_embeds": torch.ones(1, 2, 72)}]
)
def test_ids_and_embeddings_together_or_neither_are_refused(given):
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        tiny_model().model(**given)


def test_autocast_to_bfloat16_prefills_and_decodes():
    model, ids = tiny_model(), random_ids(2, 9)
    exact = model(ids).logits
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model(ids[:, :8], use_cache=True).cache
        logits = model(ids[:, 8:], cache=cache).logits
    # the yardstick is the error of a whole forward pass under autocast, which expands the latents
    with torch.autocast("cpu", torch.bfloat16):
        yardstick = relative_error(model(ids).logits, exact)
    assert relative_error(logits, exact[:, 8:]) < 3 * yardstick


def test_hidden_states_are_one_per_layer_and_the_embedding():
    model, ids = tiny_model(), random_ids(2, 9)
    output = model(ids, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(ids))
    native = native_twin(model)(ids, output_hidden_states=True)
    for ours, theirs in zip(output.hidden_states, native.hidden_states, strict=True):
        assert relative_error(ours, theirs) < 1e-5


# with the eager backend, dynamo shows all graph breaks; inductor also checks the compiled code, in a minute
BACKENDS = pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])


@BACKENDS
def test_forward_compiles_without_a_graph_break(backend):
    model, ids = tiny_model(), random_ids(2, 9)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        assert relative_error(compiled(ids, use_cache=False).logits, model(ids).logits) < 1e-5


@BACKENDS
def test_decoding_from_a_static_cache_compiles_without_a_graph_break(backend):
    model, ids = tiny_model(), random_ids(2, 12)
    expected = model(ids).logits
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
        step = torch.compile(model, fullgraph=True, backend=backend)
        for position in range(9, 12):
            logits = step(ids[:, [position]], cache=cache, position_ids=torch.tensor([[position]])).logits
            assert relative_error(logits[:, 0], expected[:, position]) < 1e-5


@pytest.mark.parametrize("make", [DynamicCache, lambda: LatentCache(DeepseekV2Config(**V2))], ids=["dynamic", "latent"])
@torch.no_grad()
def test_a_growing_cache_is_compiled_once_for_all_lengths(make):
    torch.compiler.reset()
    model, ids = tiny_model(), random_ids(1, 30)
    counter = CompileCounter()
    step, cache = torch.compile(model.forward, backend=counter, fullgraph=True), make()
    compiled = []
    for start, end in [(0, 20), *((i, i + 1) for i in range(20, 30))]:
        logits = step(ids[:, start:end], cache=cache, use_cache=True).logits
        compiled.append(counter.frame_count)
    assert compiled[-1] == compiled[4]
    assert relative_error(logits, model(ids).logits[:, -1:]) < 1e-5


# with the second, config.json has both rope_theta and rope_scaling, as those of converted models have
@pytest.mark.parametrize("rope", [{}, {"rope_theta": 50000.0}], ids=["published", "another theta"])
def test_trainer_resumes_where_it_stopped(rope, tmp_path):
    ids = random_ids(8, 12)
    rows = [{"input_ids": row, "labels": row} for row in ids]

    def trained(steps: int, folder, resume: bool):
        options = {"max_steps": steps, "save_steps": 2, "report_to": "none", "learning_rate": 1e-2, "seed": 3}
        arguments = TrainingArguments(folder, lr_scheduler_type="constant", dataloader_pin_memory=False, **options)
        trainer = Trainer(tiny_model(**rope), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model.eval().to("cpu")

    once = trained(4, tmp_path / "once", False)
    trained(2, tmp_path / "twice", False)
    twice = trained(4, tmp_path / "twice", True)
    assert relative_error(twice(ids).logits, once(ids).logits) < 1e-5
    assert relative_error(once(ids).logits, tiny_model(**rope)(ids).logits) > 1e-3


def test_rotary_frequencies_are_exact_in_every_way_of_building():
    config = DeepseekV2Config(**V2)
    plain = tiny_model().model.rotary_emb.inv_freq
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.to_empty(device="cpu")
    model.init_weights()
    assert torch.equal(model.model.rotary_emb.inv_freq, plain)
    assert (
        tiny_model(torch.bfloat16).float().model.rotary_emb(torch.zeros(1), torch.arange(3)[None])[0].dtype
        == torch.float32
    )


@pytest.mark.parametrize("grouped", [False, True], ids=["predict", "evaluate"])
def test_trainer_predicts_only_logits_with_router_logits_in_the_output(grouped, tmp_path):
    """Neither the cache, nor the balance loss, nor router logits are predictions."""
    model, ids = tiny_model(output_router_logits=True), random_ids(3, 9)
    seen = {}
    arguments = TrainingArguments(str(tmp_path), report_to="none", per_device_eval_batch_size=2, use_cpu=True)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, compute_metrics=lambda given: seen.update(given=given.predictions) or {})
    predictions = trainer.predict(rows).predictions
    if grouped:
        trainer.evaluate(rows)
        predictions = seen["given"]
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(predictions), model(ids).logits)
