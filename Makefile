# Each target sets up what it needs: a virtual environment in .venv with the pinned requirements.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

.PHONY: install test lint wheel demo bench claims gpu gpu-models docs soak slow clean

# Torch into an empty environment $(1), and the pins for all else into $(1)/requirements.txt. A CUDA build of torch
# requires the Triton that it was built with; the pin of Triton is for a CPU build, which requires none.
define install_torch
	$(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	if grep -q '^Requires-Dist: triton' $(1)/lib/python3*/site-packages/torch-*.dist-info/METADATA; \
		then grep -v '^triton==' requirements.txt; else cat requirements.txt; fi > $(1)/requirements.txt
endef

install: $(INSTALLED)

$(INSTALLED): requirements.txt setup.py pyproject.toml
	$(call install_torch,$(VENV))
	$(BIN)/pip install --quiet -r $(VENV)/requirements.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Test files in the order of their folders, by two at once. What the kernels compiled to is kept in .pytest_cache
# and used again until a kernel or the compiler changes.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/python tests/support/project/type_check.py

# The wheel with what it requires in an empty environment of $(PYTHON), and a tiny demo of it from an empty folder.
# The whole environment is built anew each time: minutes, and gigabytes where torch is a CUDA build.
WHEEL := build/wheel
TINY_DEMO := demo.num_held_out=100 demo.num_pair_prompts=200 demo.sft_steps=80 demo.reward_steps=2 demo.ppo_steps=2
wheel:
	rm -rf build/lib $(WHEEL)
	mkdir -p $(WHEEL)/empty
	$(call install_torch,$(WHEEL)/venv)
	$(WHEEL)/venv/bin/pip install --quiet "$$(grep '^setuptools==' requirements.txt)"
	$(WHEEL)/venv/bin/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $(WHEEL) .
	$(WHEEL)/venv/bin/pip install --quiet --constraint $(WHEEL)/venv/requirements.txt $(WHEEL)/*.whl
	cd $(WHEEL)/empty && env -u PYTHONPATH CUDA_VISIBLE_DEVICES= ../venv/bin/glm-rlhf demo $(TINY_DEMO)

# On the CPU, also where CUDA is: it shows what two cores do.
demo: install
	CUDA_VISIBLE_DEVICES= $(BIN)/glm-rlhf demo

# Ratios to peers, phases and scaling on this machine, into outputs/bench; four minutes on two cores.
bench: install
	$(BIN)/glm-rlhf bench

# What benchmarks/ claims of a CPU, into benchmarks/results; takes long.
claims: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kernels --device cpu
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.io.convert
	$(BIN)/python -m benchmarks.training.sequences
	$(BIN)/python -m benchmarks.generation.answers
	$(BIN)/python -m benchmarks.training.optimizer_memory
	$(BIN)/python -m benchmarks.training.reward_model

# Where CUDA is, python3 with its own torch will do: nothing is installed, and one report comes out.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.kernels.gpu

# The same of whole models, which need megatron-core too.
gpu-models:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.kernels.gpu --part models

# The page of all keys from the code, then the documentation as a site, into site/.
docs: install
	$(BIN)/pip install --quiet -r docs/requirements.txt
	$(BIN)/python docs/configuration_reference.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The table of what must not break, tried and reported; under twenty minutes on two cores.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak -s

# Cases and layouts that cheaper ones stand for in `make test`, kernels compiled for every target, the planner's
# counted memory, random models in random layouts, and PPO on a stand-in for a CUDA device (which g++ compiles).
slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -s

clean:
	rm -rf $(VENV) .mypy_packages .mypy_cache build dist *.egg-info outputs site
