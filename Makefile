# make run   set up everything in .venv, run the quick cases, write reports/site/index.html
# make install  only sets up
# make test  the same set-up with the development tools, then all tests and suites
# make vllm  vLLM's engine and its real server besides: their tests and suites
# make engines  only installs what of engines the tests and suites can use beyond `make test`
# make server   only vLLM's real server, judged by the server suites
# make lint  ruff and mypy
#
# A second call installs nothing again: stamp files in .venv remember what was installed, and
# `conformance targets install` leaves complete environments alone.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
# One process for each target at least: an engine that hangs must not hold up the others.
WORKERS ?= 4

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Runs and tests start hundreds of processes: where this is set, each of them compiles every module again.
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: install run test vllm engines server lint schemas clean

install: $(VENV)/.installed

run: $(VENV)/.installed
	$(BIN)/conformance targets install --default || echo 'going on with the targets that are there'
	$(BIN)/conformance run --quick -n $(WORKERS) --site reports/site

test: $(VENV)/.installed-dev
	$(BIN)/conformance targets install --default
	# The oracle of image processing: what the default leaves out.
	$(BIN)/conformance targets install transformers@5.19.0
	$(BIN)/python -m pytest tests/ suites/ -n $(WORKERS) --dist loadgroup \
	  --ignore suites/invariance --ignore suites/lora --ignore suites/accuracy
	# Not vLLM: nearly every one of these cases is an engine of its own, which takes it a minute to start, and
	# gates take minutes each on a CPU. Its gates are in `make vllm`, and all that is quick runs every night.
	$(BIN)/python -m pytest suites/invariance suites/lora suites/accuracy -n $(WORKERS) \
	  --target reference --target transformers@5.19.0

# What `make test` skips for want of an engine. Each of the two targets has one process, as engines are large.
vllm: $(VENV)/.installed-dev
	$(BIN)/conformance targets install vllm@0.32.0
	$(BIN)/python -m pytest tests/test_vllm_engine.py tests/test_vllm_server.py suites/generation suites/server \
	  suites/accuracy \
	  --target vllm@0.32.0 --target vllm-server@0.32.0 -n 2

# After it, `make test` runs vLLM's engine too, and backtests on the two releases between which most was mended.
engines: $(VENV)/.installed-dev
	$(BIN)/conformance targets install vllm@0.32.0
	$(BIN)/conformance targets install vllm@0.23.0
	$(BIN)/conformance targets install vllm@0.24.0

server: $(VENV)/.installed-dev
	$(BIN)/python -m pytest suites/server --target vllm-server@0.32.0

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# JSON Schemas that are committed; a test fails when they are not current.
schemas: $(VENV)/.installed-dev
	for name in $$($(BIN)/conformance schema); do \
	  $(BIN)/conformance schema $$name > conformance/schemas/$$name.schema.json || exit 1; \
	done

clean:
	rm -rf $(VENV) reports/site

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	  v in ((3, 11), (3, 12), (3, 13)) or sys.exit("Python 3.11, 3.12 or 3.13 is needed, this is %d.%d; set PYTHON=" % v)'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by itself: it brings the dependencies of whichever build the package index offers.
$(VENV)/.torch: $(VENV)/.python
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
