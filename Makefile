# make alone lists the targets. Everything runs in .venv, which is built when it is missing or requirements have changed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
GPU_FLAGS ?=
TEXT := The bank raised its interest rate again this month.

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-extras gpu check check-pins clean-demo

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-11s %s\n", $$1, $$2}'

setup: $(VENV)/ready ## build .venv with every requirement

$(VENV)/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

demo: setup clean-demo ## pairs, training, the table before and after, a picture of attention: offline, under 10 minutes
	$(OFFLINE) $(PY) make_pairs.py docstrings --out demo/pairs.jsonl
	$(OFFLINE) $(PY) train.py --pairs demo/pairs.jsonl --out runs/demo --steps 80 --pooling position-mean --scope all
	$(OFFLINE) $(PY) evaluate.py --bundled --baselines tfidf --model tiny runs/demo --prompt none cluster \
	  --pooling mean last position-mean --scope all text --out demo/results.json
	$(OFFLINE) $(PY) attention.py --model runs/demo --text "$(TEXT)" --out demo/attention

clean-demo:
	rm -rf demo runs/demo

test: setup ## the test suite, offline
	$(OFFLINE) $(PY) -m pytest -q

test-slow: setup ## tests that kill processes or run several
	$(OFFLINE) $(PY) -m pytest -q -m slow

# in a folder of their own, so that their docstrings are not among the demo's pairs
.extras/ready: requirements-extras.txt $(VENV)/ready
	rm -rf .extras
	$(PY) -m pip install --quiet --disable-pip-version-check --target .extras -r requirements-extras.txt
	touch $@

test-extras: .extras/ready ## tests of what needs further packages: the server, with the official client
	PYTHONPATH=.extras $(OFFLINE) $(PY) -m pytest -q tests/test_server.py

# nine minutes of steps; the next call goes on with those that are left. GPU_FLAGS=--dry-run: everything small, on a CPU
gpu: setup ## tests and benchmarks that need a GPU, and a table of them; repeat it until no step is left
	$(PY) bench/gpu.py --out results/gpu.jsonl $(GPU_FLAGS); status=$$?; \
	  $(PY) bench/gpu.py --out results/gpu.jsonl $(GPU_FLAGS) --table; exit $$status

check: setup ## ruff: style and likely mistakes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# --isolated leaves out local wheels and indexes: a pin must resolve for anybody
check-pins: setup ## the pinned versions resolve from the public package index alone
	$(PY) -m pip --isolated install --dry-run --ignore-installed --quiet --disable-pip-version-check -r requirements.txt -r requirements-extras.txt -c constraints.txt
