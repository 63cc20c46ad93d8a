# Each target sets up what it needs: a virtual environment in .venv with the pinned requirements.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
WORKERS ?= 2

.PHONY: install test lint demo bench claims gpu gpu-models docs soak slow clean

install: $(INSTALLED)

$(INSTALLED): requirements.txt setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$$(grep '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet -r requirements.txt
	$(BIN)/pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

# Test files in the order of their folders, by two at once: kernels need one core, ranks the other.
test: install lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo

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

# The table of what must not break, tried and reported; under ten minutes on two cores.
soak: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m soak -s

# Dear cases and layouts that cheaper ones stand for in `make test`, random models in random layouts, and PPO
# on a stand-in for a CUDA device (which g++ compiles).
slow: install
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow -s

clean:
	rm -rf $(VENV) build dist *.egg-info outputs site
