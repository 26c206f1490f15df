"""Code that looks up the name in `config.architectures`, such as TRL and `transformers serve`, gets our classes."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoTokenizer

import deepseek_latent
from tests.support import tiny_model

ROOT = Path(__file__).parents[2]
PYDOC = ROOT / "examples" / "pydoc-tiny"
NAMES = [name for name in deepseek_latent.__all__ if name.startswith("Deepseek")]
# runs in a process of its own, which serves a model and sends requests to it over HTTP
SERVED = """
import json, sys, time, urllib.error, urllib.request
import deepseek_latent
from transformers.cli.serve import Serve
folder, port, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
server = Serve(force_model=folder, device="cpu", host="127.0.0.1", port=port, non_blocking=True, **options)

def response(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))

try:
    for _ in range(120):
        try:
            response("/health")
            break
        except OSError:
            time.sleep(0.5)
    message = [{"role": "user", "content": "The import statement"}]
    settings = json.dumps({"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0})
    body = {"model": folder, "messages": message, "generation_config": settings, "stream": False}
    status = None
    if options:
        too_long = [{"role": "user", "content": "The import statement " * 200}]
        for stream in (False, True):
            try:
                response("/v1/chat/completions", body | {"messages": too_long, "stream": stream})
            except urllib.error.HTTPError as error:
                status = error.code
    text = response("/v1/chat/completions", body)["choices"][0]["message"]["content"]
    kinds = [type(kept.model).__module__ for kept in server._model_manager.loaded_models.values()]
    print("FOUND " + json.dumps({"text": text, "kinds": kinds, "status": status}))
finally:
    server.kill_server()
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_class_name_in_transformers_is_our_class(name):
    assert getattr(transformers, name) is getattr(deepseek_latent, name)


@pytest.mark.parametrize(
    "early", ["", "import transformers.processing_utils", "import transformers.models.deepseek_v2"]
)
def test_a_class_name_is_ours_for_code_that_imported_transformers_before(early):
    """transformers replaces its own module while it is imported; both modules have our classes."""
    program = f"""
import transformers
{early}
from transformers import AutoProcessor
import deepseek_latent
import transformers as again
assert transformers.DeepseekV2ForCausalLM is again.DeepseekV2ForCausalLM is deepseek_latent.DeepseekV2ForCausalLM
assert "deepseek_latent" not in again.models.deepseek_v2.modeling_deepseek_v2.DeepseekV2ForCausalLM.__module__
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that transformers' own class computes differently, since it does not normalize gates."""
    tokenizer = AutoTokenizer.from_pretrained(PYDOC)
    model = tiny_model(norm_topk_prob=True, vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(tmp_path)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("adapters", [False, True], ids=["whole", "LoRA"])
def test_trl_compares_this_model_with_itself(adapters, folder, tmp_path):
    """The first loss of DPO is ln 2 if policy and reference are the same model, and not otherwise."""
    trl = pytest.importorskip("trl", reason="trl is not installed; make test-tools installs it")
    from datasets import Dataset

    pairs = {"prompt": ["The import statement", "A list is"], "chosen": [" binds names", " mutable"]}
    arguments = trl.DPOConfig(
        str(tmp_path / "out"),
        max_steps=1,
        logging_steps=1,
        bf16=False,
        report_to="none",
        save_strategy="no",
        router_aux_loss_coef=0.0,
        use_cpu=True,
    )
    trainer = trl.DPOTrainer(
        model=str(folder),
        args=arguments,
        train_dataset=Dataset.from_dict(pairs | {"rejected": [" fails", " a tuple"]}),
        processing_class=AutoTokenizer.from_pretrained(folder),
        peft_config=deepseek_latent.lora_config(tiny_model(), r=4) if adapters else None,
    )
    models = [trainer.model.get_base_model() if adapters else trainer.model]
    models += [] if adapters else [trainer.ref_model]
    assert all(isinstance(model, deepseek_latent.DeepseekV2ForCausalLM) for model in models)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"continuous_batching": True, "cb_num_blocks": 8, "cb_block_size": 16}], ids=["plain", "in pages"]
)
def test_transformers_serve_answers_with_this_model(folder, options):
    """In pages, also after requests that are too long for all of them."""
    pytest.importorskip("fastapi", reason="fastapi is not installed; make test-tools installs it")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SERVED, str(folder), str(port), json.dumps(options)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND ")
    )
    assert found["kinds"] == ["deepseek_latent.modeling_deepseek_v2"]
    assert found["status"] == (500 if options else None)
    model, tokenizer = (
        deepseek_latent.DeepseekV2ForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer("The import statement ", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        generated = model.generate(ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0)
    assert found["text"] == tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
