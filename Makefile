MODEL ?= examples/pydoc-tiny
PROMPT ?= The import statement
# what `make chat` asks; empty to talk, or to read questions from stdin
QUESTION ?=
PYTHON ?= python3
# test files for the suites on other versions; empty for all
TESTS ?=
# how long `make torture` attacks, and with which parts; empty for all
MINUTES ?= 60
PARTS ?=
# how `make test-newest` installs torch: by default the CPU build that constraints.txt names
TORCH ?= --constraint constraints.txt torch

# one test file of each kind, without compilation, new processes and most ways to generate
FAST := tests/test_architecture.py tests/test_public_names.py tests/attention/test_ops.py \
	tests/attention/test_masks.py tests/attention/test_absorption_guard.py tests/cache/test_latent_cache.py \
	tests/cache/test_format.py tests/cache/test_static_cache.py tests/cache/test_page_groups.py \
	tests/cache/test_records.py tests/experts/test_moe.py tests/experts/test_weights.py \
	tests/experts/test_packed.py tests/experts/test_trained.py tests/experts/test_balance.py \
	tests/finetuning/test_expert_lora.py tests/finetuning/test_lora.py tests/finetuning/test_expert_selection.py \
	tests/model/test_model.py tests/model/test_equals_native.py tests/model/test_configuration.py \
	tests/model/test_configuration_refusals.py tests/model/test_weights.py tests/model/test_bad_use.py \
	tests/model/test_generation_modes.py tests/kernels/test_bound_functions.py \
	tests/kernels/test_replayed_steps.py tests/conversion/test_gqa_to_mla.py tests/conversion/test_checkpoint.py \
	tests/conversion/test_size.py tests/commands/test_commands.py tests/compat/test_torch.py \
	tests/compat/test_peft.py tests/compat/test_accelerate.py
NOT_FAST := compile or import or process or train or (no_output and not greedy and not lookup)

.PHONY: demo chat real test test-fast test-parallel test-slow test-tools test-oldest test-middle test-newest test-triton torture gpu outdated check docs bench finetune dist clean

.venv/installed: pyproject.toml constraints.txt
	@echo "making .venv from constraints.txt: a few minutes, once"
	@$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --constraint constraints.txt torch
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

.venv-oldest/installed: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint constraints-oldest.txt --editable ".[dev]"
	touch $@

.venv-middle/installed: pyproject.toml constraints-middle.txt
	$(PYTHON) -m venv .venv-middle
	.venv-middle/bin/pip install --quiet --constraint constraints-middle.txt torch
	.venv-middle/bin/pip install --quiet --constraint constraints-middle.txt --editable ".[dev]"
	touch $@

.venv-tools/installed: pyproject.toml constraints.txt
	@echo "making .venv-tools from constraints.txt: a few minutes, once"
	@$(PYTHON) -m venv .venv-tools
	.venv-tools/bin/pip install --quiet --constraint constraints.txt torch
	.venv-tools/bin/pip install --quiet --constraint constraints.txt --editable ".[dev,train,tools]"
	touch $@

.venv-docs/installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/pip install --quiet --constraint constraints.txt $$($(PYTHON) -m tests.versions docs)
	touch $@

demo: .venv/installed  ## a trained DeepSeek-V2 generates text with a cache of latents (MODEL=folder or hub id)
	.venv/bin/deepseek-latent generate "$(MODEL)" "$(PROMPT)" --temperature 0.7 --top-p 0.9 --seed 1

chat: .venv/installed .real/mla/config.json  ## SmolLM2-135M converted to latent attention answers (a line of stdin each, or QUESTION=...)
	.venv/bin/deepseek-latent generate .real/mla $(if $(QUESTION),"$(QUESTION)") --chat --max-new-tokens 300 --temperature 0.2 --top-p 0.9 --seed 1

.real/llama/config.json: | .venv/installed
	.venv/bin/python examples/real_model.py .real/llama

.real/mla/config.json: .real/llama/config.json
	.venv/bin/deepseek-latent convert gqa-to-mla .real/llama .real/mla --force

.real/texts/calibration.txt: | .venv/installed
	.venv/bin/python examples/real_texts.py .real/texts

real: .venv/installed .real/mla/config.json .real/texts/calibration.txt  ## SmolLM2-135M goes through every feature (5 minutes; 3 GB of disk)
	.venv/bin/python -m pytest -m real tests/real

test: .venv/installed  ## the suite, in at most 12 minutes on two cores
	.venv/bin/python -m pytest -m "not slow and not parallel"

test-parallel: .venv/installed  ## the model on two and four processes, by torch.distributed on this machine
	.venv/bin/python -m pytest -m parallel

test-fast: .venv/installed  ## for the edit loop: a test file of each kind, about a minute
	.venv/bin/python -m pytest -m "not slow" -k "not ($(NOT_FAST))" $(FAST)

test-slow: .venv/installed  ## slow tests: compilation with inductor, training
	.venv/bin/python -m pytest -m slow

torture: .venv/installed  ## attacks for an hour: fuzzed files, killed writers, bad calls (MINUTES=60 PARTS="kill_points ...")
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.torture $(PARTS) --minutes $(MINUTES)

test-tools: .venv-tools/installed  ## tests with bitsandbytes, torchao, TRL, servers, lm-eval and the notebook, in an environment of their own, since peft imports these wherever it finds them
	OMP_NUM_THREADS=1 .venv-tools/bin/python -m pytest tests/finetuning/test_quantized_linears.py tests/finetuning/test_finetuning_examples.py tests/compat/test_by_class_name.py tests/test_recipes.py tests/test_notebook.py

test-oldest: .venv-oldest/installed  ## the suite on the oldest versions that pyproject.toml admits
	.venv-oldest/bin/python -m pytest -m "not slow and not parallel" $(TESTS)

test-middle: .venv-middle/installed  ## the suite on transformers 5.19, which vLLM installs
	.venv-middle/bin/python -m pytest -m "not slow and not parallel" $(TESTS)

test-triton: .venv-oldest/installed  ## the GPU kernels, run by Triton's interpreter on a CPU
	TRITON_INTERPRET=1 .venv-oldest/bin/python -m pytest -m "not slow" tests/kernels/test_triton_*.py

gpu:  ## on a machine with a CUDA device, in its environment: tests, then benchmarks into benchmarks/results (8 minutes)
	$(PYTHON) -m pytest tests/kernels/test_gpu.py tests/kernels/test_triton_*.py
	$(PYTHON) -m benchmarks.gpu --out benchmarks/results

test-newest:  ## the suite on the newest released versions, without the bounds of pyproject.toml (TORCH=torch: also of torch)
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/pip install --quiet $(TORCH)
	.venv-newest/bin/python -m tests.versions newest > .venv-newest/requirements.txt
	.venv-newest/bin/pip install --quiet --upgrade --requirement .venv-newest/requirements.txt
	.venv-newest/bin/pip install --quiet --no-deps --editable .
	.venv-newest/bin/python -m tests.versions installed
	.venv-newest/bin/python -m pytest -m "not slow and not parallel" $(TESTS)

outdated: .venv-tools/installed  ## which entries of constraints.txt have a newer release
	.venv-tools/bin/python -m tests.versions outdated

check: .venv/installed  ## lint and format
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

bench: .venv/installed  ## time and memory against context and prompts, against transformers' own class (15 minutes, 16 GB)
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	.venv/bin/python -m benchmarks.decode --out benchmarks/results/decode.json
	.venv/bin/python -m benchmarks.prefill --out benchmarks/results/prefill.json

finetune: .venv/installed  ## what LoRA and ESFT learn of a new text and forget of the old (20 minutes)
	.venv/bin/pip install --quiet --constraint constraints.txt --editable ".[train]"
	.venv/bin/python examples/finetune_lora.py
	.venv/bin/python examples/finetune_esft.py

docs: .venv-docs/installed  ## the documentation as a site in build/site; a link or a name that is broken fails
	.venv-docs/bin/mkdocs build --strict --quiet

dist: .venv/installed  ## wheel and source distribution in dist/; the wheel writes text in an environment of its own
	rm -rf dist .venv-dist
	.venv/bin/python -m build --outdir dist
	$(PYTHON) -m venv .venv-dist
	.venv-dist/bin/pip install --quiet --constraint constraints.txt torch
	.venv-dist/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd dist && ../.venv-dist/bin/deepseek-latent generate ../examples/pydoc-tiny "The import statement"
	rm -rf .venv-dist

clean:
	rm -rf dist build/site .real .venv .venv-docs .venv-tools .venv-oldest .venv-middle .venv-newest .venv-dist
