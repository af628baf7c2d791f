# Needs make, bash and Python 3.11 or newer; all else goes to .venv and data. Another Python: make PYTHON=python3.12
PYTHON ?= python3
SHELL := bash
PY := .venv/bin/python
# Of pip's many lines, those that show where the time goes.
PIP := set -o pipefail; $(PY) -m pip --disable-pip-version-check install
SHOW := | sed -nE '/^ *(Downloading|Using cached) .* MB\)/p; s/^(Installing) collected packages.*/  \1/p'

.PHONY: help demo test test-parity check clean fetch .venv

help:
	@echo 'make demo    prune and retrain a small model here, and print what it cost'
	@echo 'make test    all tests'
	@echo 'make test-parity  eleven steps of the reference, where its figures are at hand: about eight minutes'
	@echo 'make check   lint, format and types'
	@echo 'make clean   remove caches and the output of the demo; .venv and data stay'

demo: .venv/installed fetch
	$(PY) main.py --config=configs/demo.py --workdir=out/demo

test: .venv/installed-test .venv/transformers-4.57/installed fetch
	$(PY) -m pytest -q

# Where the reference's figures lie beside the checkout; else it skips.
test-parity: .venv/installed-test fetch
	$(PY) -m pytest -q -m parity

check: .venv/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf out/demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache data/.fetch-*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

fetch: .venv/created
	@$(PY) scripts/fetch_demo.py

.venv: .venv/installed

# A healthy .venv made by hand is kept. Debian's python3 without python3-venv has no ensurepip: then its pip, if any,
# installs pip.
.venv/created:
	@$(PY) -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "'$(PYTHON)' is not Python 3.11 or newer: name one, as in 'make PYTHON=python3.12'" >&2; exit 1; }; \
	  echo 'making .venv'; rm -rf .venv; \
	  $(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; $(PYTHON) -m venv --without-pip .venv && \
	    $(PYTHON) -m pip --python $(PY) install -q pip; } >/dev/null 2>&1 || { rm -rf .venv; \
	    echo "'$(PYTHON) -m venv' fails: install its venv module (Debian, Ubuntu: apt install python3-venv)," \
	      "or name another Python, as in 'make PYTHON=python3.12'" >&2; exit 1; }; }
	@touch $@

.venv/installed: .venv/created pyproject.toml constraints.txt
	@echo 'installing JAX and the other packages: about 280 MB to download'
	@$(PIP) -e . -c constraints.txt $(SHOW)
	@touch $@

.venv/installed-test: .venv/installed
	@echo 'installing what the tests need: PyTorch, transformers 4.57, linters'
	@$(PIP) -e '.[test]' -c constraints.txt $(SHOW)
	@touch $@

# The newest transformers 4, with the newest releases it accepts: for tests that exports load there too.
.venv/transformers-4.57/installed: .venv/installed-test
	@rm -rf $(@D)
	@$(PIP) --target $(@D) --no-deps transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 $(SHOW)
	@touch $@
