"""Which LoRA targets act elsewhere: python -m benchmarks.adapter_targets --llama-cpp FOLDER --llama-python PYTHON

This package saves adapters of small random DeepSeek-V2 models: one for each single target, those of `lora_config`,
lists for one destination, and a model merged with its adapter. Each is read by peft on transformers' own class, in a
process that never imports this package, and by llama.cpp after its own converter. The result is the number of LoRA
tensors that are loaded from the file, and whether the adapter changes the logits there as it does here: equal (the
relative error of the change is below 2e-2), no effect, differs, or refused with an error. `lora_B` is random, since
adapters that start at zero have no effect.

FOLDER is llama.cpp from the source of llama-cpp-python: run `pip download --no-binary :all: --no-deps
llama-cpp-python`, unpack it, and take vendor/llama.cpp; its converters run in the environment of this command. PYTHON
is the interpreter of any environment with llama-cpp-python, which does not need torch. It takes two minutes and was run
with version 0.3.36.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np

# torch and this package are imported inside functions: llama.cpp's environment has neither of them, and the process of
# stock peft must not import this package

TOKENIZER = Path(__file__).parent.parent / "examples" / "pydoc-tiny"
CONFIG = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "initializer_range": 0.08,
}
# llama.cpp recognizes a model without q_lora_rank only if it has 26 or 27 layers
BASES = {"full": {"q_lora_rank": 40, "num_hidden_layers": 4}, "lite": {"q_lora_rank": None, "num_hidden_layers": 27}}
MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# rows with a LoraConfig, and its options
ALONE = {name: {"target_modules": [name]} for name in ["q_proj", *ATTENTION, *MLP]} | {
    "gate_proj, up_proj, down_proj": {"target_modules": MLP},
    **{name: {"target_modules": [], "target_parameters": [name]} for name in EXPERTS},
    "both of experts": {"target_modules": [], "target_parameters": EXPERTS},
    "router's gate.weight": {"target_modules": [], "target_parameters": ["gate.weight"]},
    "lm_head": {"target_modules": ["lm_head"]},
}
# rows with a `lora_config`, and its options
ROUTED = "lora_config(routed_experts=True)"
CHOSEN = {
    "lora_config()": {},
    ROUTED: {"routed_experts": True},
    "list for stock": {"routed_experts": True, "target_modules": ATTENTION},
    "list for llama.cpp": {"target_modules": ["o_proj", *MLP]},
    "list for llama.cpp, use_rslora": {"target_modules": ["o_proj", *MLP], "use_rslora": True},
}
ADAPTERS = [*ALONE, *CHOSEN]
MERGED = f"{ROUTED}, merged"
MODELS = [*BASES, MERGED]
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1"}
# llama.cpp does not know the tokenizer's hash; any pre-tokenizer will do, since only ids are compared
CONVERT_MODEL = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-llm"
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def folder_of(scratch: Path, name: str) -> Path:
    """The folder of a model or an adapter, with `saved`, `saved.gguf`, and the logits [s vocab] of each part."""
    return scratch / re.sub(r"\W+", "_", name)


def base_of(name: str) -> str:
    """The name of the model to which an adapter belongs; for a model, its own name."""
    return name if name in MODELS else "lite" if name == "q_proj" else "full"


def refusal(error: str) -> dict:
    return {"verdict": "refused", "error": textwrap.shorten(error, 100, placeholder=" ...")}


def lora_tensors(folder: Path) -> set[str]:
    from safetensors.numpy import load_file

    # for lm_head, peft also saves the weight itself
    return {name for name in load_file(folder / "adapter_model.safetensors") if "lora_" in name}


def run_ours(scratch: Path) -> dict:
    """Saves all models, adapters and our logits."""
    import torch
    from peft import LoraConfig, get_peft_model

    from deepseek_latent import DeepseekV2Config, DeepseekV2ForCausalLM, lora_config

    ids = torch.randint(3, 2000, (1, 24), generator=torch.Generator().manual_seed(5))
    np.save(scratch / "ids.npy", ids.numpy())

    def save(name: str, model: torch.nn.Module) -> None:
        folder = folder_of(scratch, name)
        model.save_pretrained(folder / "saved")
        np.save(folder / "ours.npy", model(input_ids=ids, use_cache=False).logits[0].detach().numpy())
        if name in MODELS:
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy(TOKENIZER / file, folder / "saved")

    for name, layers in BASES.items():
        torch.manual_seed(0)
        save(name, DeepseekV2ForCausalLM(DeepseekV2Config(**CONFIG | layers)).eval())
    for name in ADAPTERS:
        model = DeepseekV2ForCausalLM.from_pretrained(folder_of(scratch, base_of(name)) / "saved").eval()
        torch.manual_seed(1)
        if name in ALONE:
            config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **ALONE[name])
        else:
            config = lora_config(model, r=8, **CHOSEN[name])
        model = get_peft_model(model, config).eval()
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.1)
        save(name, model)
        if name == ROUTED:
            save(MERGED, model.merge_and_unload())
    return {}


def run_stock(scratch: Path) -> dict:
    """Saves the logits of transformers' own class with peft; returns the number of loaded tensors or the error."""
    import torch
    from peft import PeftModel
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM

    ids, found = torch.from_numpy(np.load(scratch / "ids.npy")), {}
    for name in [*MODELS, *ADAPTERS]:
        folder = folder_of(scratch, name)
        model = DeepseekV2ForCausalLM.from_pretrained(folder_of(scratch, base_of(name)) / "saved").eval()
        if name in ADAPTERS:
            try:
                model = PeftModel.from_pretrained(model, folder / "saved").eval()
            except (ValueError, RuntimeError) as error:
                found[name] = refusal(f"{type(error).__name__}: {error}")
                continue
            held = {key.replace(".default.", ".") for key, _ in model.named_parameters()}
            found[name] = {"landed": len(held & lora_tensors(folder / "saved"))}
        np.save(folder / "stock.npy", model(input_ids=ids, use_cache=False).logits[0].detach().numpy())
    assert "deepseek_latent" not in sys.modules
    return found


def run_llama(scratch: Path) -> dict:
    """Saves llama.cpp's logits for all that was converted; returns its errors and version."""
    import llama_cpp

    ids, errors = np.load(scratch / "ids.npy")[0].tolist(), {}
    for name in [*MODELS, *ADAPTERS]:
        file, adapter = folder_of(scratch, base_of(name)) / "saved.gguf", folder_of(scratch, name) / "saved.gguf"
        if not adapter.exists():
            continue
        # type 0 means a cache in float32
        options = {"n_ctx": 64, "logits_all": True, "flash_attn": False, "type_k": 0, "type_v": 0, "verbose": False}
        try:
            model = llama_cpp.Llama(str(file), lora_path=str(adapter) if name in ADAPTERS else None, **options)
            model.eval(ids)
        except (ValueError, RuntimeError) as error:
            errors[name] = refusal(f"{type(error).__name__}: {error}")
            continue
        np.save(folder_of(scratch, name) / "llama.npy", model.scores[: len(ids)])
    return {"version": importlib.metadata.version("llama-cpp-python"), "errors": errors}


def convert(scratch: Path, name: str, llama_cpp: Path) -> dict:
    """Runs llama.cpp's converter on a model or an adapter; returns the number of tensors or the error's last line."""
    saved, out = folder_of(scratch, name) / "saved", folder_of(scratch, name) / "saved.gguf"
    if name in MODELS:
        own = ["-c", CONVERT_MODEL, llama_cpp, llama_cpp / "convert_hf_to_gguf.py", saved, "--outtype", "f32"]
    else:
        own = [llama_cpp / "convert_lora_to_gguf.py", "--base", folder_of(scratch, base_of(name)) / "saved", saved]
    command = [sys.executable, *own, "--outfile", out]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=OFFLINE)
    if done.returncode:
        assert name in ADAPTERS, done.stderr
        out.unlink(missing_ok=True)
        return {"tensors": None} | refusal(done.stderr.strip().splitlines()[-1])
    # GGUF: magic, version, number of tensors
    _, _, tensors = struct.unpack("<4sIQ", out.read_bytes()[:16])
    return {"tensors": tensors, "verdict": "converted", "error": None}


def add_verdict(scratch: Path, name: str, part: str, known: dict) -> dict:
    """Adds the verdict to what is `known` of a part; it is None if the part has no logits."""
    row = {"verdict": None, "relative_error": None, "error": None} | known
    if row["error"] is not None or not (folder_of(scratch, name) / f"{part}.npy").exists():
        return row
    # the merged model is compared with the full one
    pair = (name, "full" if name == MERGED else base_of(name))
    logits = [
        [np.load(folder_of(scratch, x) / f"{side}.npy").astype("float64") for x in pair] for side in ("ours", part)
    ]
    expected, found = (with_it - without for with_it, without in logits)
    error, share = (float(np.linalg.norm(x) / np.linalg.norm(expected)) for x in (found - expected, found))
    verdict = "equal" if error < 2e-2 else "no effect" if share < 1e-6 else "differs"
    return row | {"verdict": verdict, "relative_error": float(f"{error:.1e}")}


def difference_without_adapter(scratch: Path, part: str) -> float:
    """The largest difference between the base models' logits and ours, relative to the largest logit."""
    pairs = [[np.load(folder_of(scratch, name) / f"{side}.npy") for side in ("ours", part)] for name in BASES]
    found = max(float(abs(other - own).max() / abs(own).max()) for own, other in pairs)
    assert found < 1e-4, f"the logits of {part} differ by {found} without any adapter"
    return float(f"{found:.1e}")


def format_cell(row: dict, loaded: str = "") -> str:
    if row["verdict"] == "refused":
        return f"refused: {row['error']}"
    count = f"{row[loaded]} of {row['saved']}; " if row.get("saved") else ""
    error = f" ({row['relative_error']:.2g})" if row["verdict"] in ("equal", "differs") else ""
    return f"{count}{row['verdict'] or '-'}{error}"


def run_elsewhere(python: str, function: str, scratch: Path) -> dict:
    """Calls the function of this name in a process of its own, and returns its result."""
    code = f"import sys; from benchmarks.adapter_targets import *; print(json.dumps({function}(Path(sys.argv[1]))))"
    done = subprocess.run([python, "-c", code, scratch], check=True, stdout=subprocess.PIPE, text=True, env=OFFLINE)
    return json.loads(done.stdout.splitlines()[-1])


def measure(scratch: Path, llama_cpp: Path, llama_python: str) -> dict:
    run_elsewhere(sys.executable, "run_ours", scratch)
    in_stock, rows = run_elsewhere(sys.executable, "run_stock", scratch), {}
    converters = {name: convert(scratch, name, llama_cpp) for name in [*MODELS, *ADAPTERS]}
    in_llama = run_elsewhere(llama_python, "run_llama", scratch)
    for name in [*ADAPTERS, MERGED]:
        saved = len(lora_tensors(folder_of(scratch, name) / "saved")) if name in ADAPTERS else None
        rows[name] = {
            "stock": {"landed": None, "saved": saved} | add_verdict(scratch, name, "stock", in_stock.get(name, {})),
            "converter": converters[name] | {"saved": saved},
            "llama_cpp": add_verdict(scratch, name, "llama", in_llama["errors"].get(name, {})),
        }
    return {
        "llama_cpp_python": in_llama["version"],
        "difference_without_adapter": {part: difference_without_adapter(scratch, part) for part in ("stock", "llama")},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama-cpp", type=Path, required=True, help="folder of llama.cpp, for its converters")
    parser.add_argument("--llama-python", required=True, help="python of an environment with llama-cpp-python")
    parser.add_argument("--out", type=Path, help="write the result here, as JSON")
    options = parser.parse_args()
    from .machine import described

    with tempfile.TemporaryDirectory() as scratch:
        result = measure(Path(scratch), options.llama_cpp, options.llama_python)
    result = described("python -m benchmarks.adapter_targets") | {"peft": importlib.metadata.version("peft")} | result
    print("| target | stock transformers and peft | converter of llama.cpp | llama.cpp |\n|---|---|---|---|")
    for name, row in result["rows"].items():
        cells = (
            format_cell(row["stock"], "landed"),
            format_cell(row["converter"], "tensors"),
            format_cell(row["llama_cpp"]),
        )
        print(f"| {name} | {' | '.join(cells)} |")
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
