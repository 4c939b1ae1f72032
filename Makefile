# make demo: train, evaluate and talk to a small model.   make test: the test suite.   make check: style and structure.
# make equivalence [QUICK=1]: every layout of ranks against one process. What takes minutes: pytest -m slow.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
RUN := runs/demo
RANKS = $(shell $(VENV)/bin/python -c "import torch; print(min(2, torch.cuda.device_count()) or 2)")

ifneq ($(shell uname -s),Linux)
$(error AVLM runs on Linux: its torch and triton wheels and its process handling are made for it)
endif

.PHONY: demo test check equivalence clean

demo: $(VENV)/.demo
	$(VENV)/bin/torchrun --nproc-per-node $(RANKS) train.py configs/demo.yaml
	$(VENV)/bin/torchrun --nproc-per-node $(RANKS) -m avlm.evaluation $(RUN) --data data/demo
	$(VENV)/bin/python -m avlm.metrics $(RUN)
	$(VENV)/bin/python -m avlm.data.demo_bank.ask $(RUN)

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest -m "not slow"
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/kernels

check: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest tests/test_architecture.py

equivalence: $(VENV)/.test
	$(VENV)/bin/python -m tests.parallel.equivalence $(if $(QUICK),--quick)

# The environment is made again when a requirements file is newer than its stamp.
$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "AVLM needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: requirements.txt | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.test: requirements-dev.txt $(VENV)/.demo
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) runs data
