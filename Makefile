# `make` lists the targets. Everything is installed into .venv; nothing else on the machine is touched.

PYTHON ?= python3
ifndef DEVICE
DEVICE := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
MODEL ?= examples/ouro-tiny
NAME ?= ouro-tiny
PORT ?= 8000
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(DEVICE)
SPECULATION ?= {"method": "custom_class", "model": "ouro_vllm.SelfSpeculator", "num_speculative_tokens": 8}
QUESTION := {"model": "$(NAME)", "prompt": "def read_config(filename, encoding=None):\n", "max_tokens": 64, "temperature": 0}

# Tests run in two halves side by side, where every engine of the CPU build takes one core: the bundled model is too small
# for more to help. A GPU is used by one half at a time.
HALF := $(addprefix tests/test_,speculation.py sharing.py shapes.py)
JOBS := $(if $(filter cpu,$(DEVICE)),2,1)
ALONE := $(if $(filter cpu,$(DEVICE)),OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind)

.DEFAULT_GOAL := help
.PHONY: help install serve demo doctor test test-drafts test-rest clean

help: ## list the targets
	@echo "Targets (serve, demo, doctor and test install first if needed):"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s  %s\n", $$1, $$2 }' Makefile
	@echo "Variables: MODEL=$(MODEL) PORT=$(PORT) NAME=$(NAME) DEVICE=$(DEVICE) PYTHON=$(PYTHON)"
	@echo "           ARGS=... goes to vllm serve, pytest or doctor"

install: $(STAMP) ## make .venv with vLLM for this machine and ouro-vllm (DEVICE=cpu or cuda overrides the choice)
	@echo "==> install: vLLM for $(DEVICE) and ouro-vllm are in $(VENV)"

serve: $(STAMP) ## serve MODEL on PORT under the name NAME until Ctrl-C, early loops drafting
	@echo "==> serve: $(MODEL) on port $(PORT). Once it says 'Application startup complete', try:"
	@printf "curl -s http://localhost:$(PORT)/v1/completions -H 'Content-Type: application/json' -d '%s'\n" '$(QUESTION)'
	@echo "    or watch answers form: http://localhost:$(PORT)/anytime"
	@VLLM_PLUGINS="$${VLLM_PLUGINS-ouro}" $(BIN)/ouro-vllm serve "$(MODEL)" --port $(PORT) \
	  --served-model-name "$(NAME)" --speculative-config '$(SPECULATION)' $(ARGS)

demo: $(STAMP) ## start a server on a free port, ask it two things, measure the gain from drafting, stop it
	@echo "==> demo: start a server for $(MODEL), ask it two things, stop it"
	@$(BIN)/ouro-vllm demo "$(MODEL)" -- $(ARGS)

doctor: $(STAMP) ## say what is installed, which hooks are active, what is wrong and how to mend it
	@echo "==> doctor: look at this machine, the installation and $(MODEL)"
	@$(BIN)/ouro-vllm doctor "$(MODEL)" $(ARGS)

test: $(STAMP) ## run ruff and the whole test suite
	@echo "==> test: ruff, then every test"
	@$(BIN)/ruff check .
	@$(MAKE) --no-print-directory --output-sync=line -j$(JOBS) test-drafts test-rest

# What compares whole answers under drafting or sharing takes as long as nearly everything else.
test-drafts:
	@$(ALONE) $(BIN)/pytest $(HALF) $(ARGS)

test-rest:
	@$(ALONE) $(BIN)/pytest tests $(addprefix --ignore=,$(HALF)) $(ARGS)

clean: ## remove .venv and everything built or cached
	@echo "==> clean: remove .venv, build products and caches"
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is the last thing written: an interrupted install is taken up again. A .venv that is broken, too old or made
# for the other device (the CPU and CUDA builds of vLLM and torch share files) is made anew.
$(STAMP): setup.py Makefile
	@case "$(DEVICE)" in cpu|cuda) ;; *) echo "DEVICE=$(DEVICE): must be cpu or cuda."; exit 1;; esac
	@echo "==> install: vLLM for $(DEVICE) and ouro-vllm go into $(VENV) (a few minutes the first time)"
	@if [ "$$(cat $(VENV)/.device 2>/dev/null || echo $(DEVICE))" != "$(DEVICE)" ] || \
	    ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "ouro-vllm needs Python 3.11 or newer; $(PYTHON) --version says: $$($(PYTHON) --version 2>&1 | tail -n 1)." \
	      "Mend: make install PYTHON=/path/to/python3.11 (or newer)."; exit 1; }; \
	  $(PYTHON) -m venv --clear $(VENV) || exit 1; \
	fi
	@echo $(DEVICE) > $(VENV)/.device
	@$(BIN)/python -m pip install --disable-pip-version-check -e '.[$(DEVICE),test]' || { \
	  echo "pip could not install the requirements (its reason is above)."; \
	  [ $(DEVICE) != cpu ] || echo "If it found no torch for the CPU (a version ending in +cpu): set PIP_EXTRA_INDEX_URL" \
	    "to PyTorch's index of CPU wheels, which PyTorch's installation page names, and run make again."; \
	  exit 1; }
	@if [ $(DEVICE) = cpu ]; then \
	  broken="$$($(BIN)/python -c 'from ouro_vllm.doctor import broken_companions; print(*broken_companions())')" || exit 1; \
	  [ -z "$$broken" ] || { \
	    echo "==> install: remove $$broken: not loadable beside this torch, not needed for text, and in vLLM's way"; \
	    $(BIN)/python -m pip uninstall --quiet --yes $$broken; }; \
	fi
	@rm -f $(VENV)/.installed-*
	@touch $@
