# make alone lists the targets. Everything runs in .venv, which is built when it is missing or requirements have changed.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
GPU_FLAGS ?=
PATHOLOGY := env $(OFFLINE) .pathology/bin/python -m pathology
SITE := import sysconfig; print(sysconfig.get_path('purelib'))
TEXT := The bank raised its interest rate again this month.

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-extras test-vllm test-llama-cpp test-pathology pathology clean-pathology gpu check check-pins clean-demo

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/ready ## build .venv with every requirement

$(VENV)/ready: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@

demo: setup clean-demo ## pairs, training, the table before and after, a picture of attention: offline; 5 minutes on two cores with bfloat16
	$(OFFLINE) $(PY) make_pairs.py docstrings --out demo/pairs.jsonl
	$(OFFLINE) $(PY) train.py --pairs demo/pairs.jsonl --out runs/demo --steps 80 --pooling position-mean --scope all
	$(OFFLINE) $(PY) evaluate.py --bundled --baselines tfidf --model tiny runs/demo --prompt none cluster \
	  --pooling mean last position-mean --scope all text --out demo/results.json
	$(OFFLINE) $(PY) attention.py --model runs/demo --text "$(TEXT)" --out demo/attention

clean-demo:
	rm -rf demo/attention demo/*.json* runs/demo  # and leaves demo/pathology

test: setup ## the test suite, offline
	$(OFFLINE) $(PY) -m pytest -q

test-slow: setup ## tests that kill processes or run several
	$(OFFLINE) $(PY) -m pytest -q -m slow

# an environment of its own, so that its docstrings are not among the demo's pairs; it sees the packages of .venv and adds what they lack.
# langchain-huggingface without what it asks for: that excludes huggingface_hub 2, and its class for folders needs sentence-transformers alone
.extras/ready: requirements-extras.txt constraints.txt $(VENV)/ready
	rm -rf .extras
	$(PY) -m venv .extras
	$(PY) -c "$(SITE)" > $$(.extras/bin/python -c "$(SITE)")/venv.pth
	.extras/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-extras.txt -c constraints.txt
	.extras/bin/python -m pip install --quiet --disable-pip-version-check --no-deps langchain-huggingface==1.2.3
	touch $@

test-extras: .extras/ready test-vllm ## tests of what needs further packages: the server and its clients, libraries on exported folders, vLLM
	$(OFFLINE) .extras/bin/python -m pytest -q tests/test_server.py tests/test_ecosystem.py tests/test_embed_index.py tests/test_embed_ray.py tests/test_export_onnx.py tests/test_report_page.py tests/test_attention_page.py

# as .extras is built, with an older transformers; without dependencies, as it asks for packages that text does not need
.vllm/ready: requirements-vllm.txt | $(VENV)/ready
	rm -rf .vllm
	$(PY) -m venv .vllm
	$(PY) -c "$(SITE)" > $$(.vllm/bin/python -c "$(SITE)")/venv.pth
	.vllm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-vllm.txt
	touch $@

ifeq ($(shell uname -sm),Linux x86_64)
test-vllm: setup .vllm/ready ## exported folders in vLLM, by its server and offline
	VLLM_PYTHON=$(CURDIR)/.vllm/bin/python $(OFFLINE) $(PY) -m pytest -q tests/test_vllm.py
else
test-vllm:
	@echo "vLLM for CPUs is there for Linux on x86-64 only: its tests are left out"
endif

LLAMA_PINS := -c requirements-llama-cpp.txt -c constraints.txt
# as .extras is built; the library comes from its source archive, which also holds the converter that the tests need
.llama/ready: requirements-llama-cpp.txt constraints.txt | $(VENV)/ready
	@[ "$$(uname -s)" = Linux ] && command -v g++ >/dev/null || { echo "llama.cpp is built and tested on Linux with g++ only: install g++ there"; exit 2; }
	rm -rf .llama
	$(PY) -m venv .llama
	$(PY) -c "$(SITE)" > $$(.llama/bin/python -c "$(SITE)")/venv.pth
	.llama/bin/python -m pip install --quiet --disable-pip-version-check $(LLAMA_PINS) cmake ninja scikit-build-core diskcache sentencepiece
	.llama/bin/python -m pip download --quiet --disable-pip-version-check $(LLAMA_PINS) --no-deps --no-build-isolation --no-binary llama-cpp-python --dest .llama llama-cpp-python
	mkdir .llama/source && tar -xzf .llama/llama_cpp_python-*.tar.gz -C .llama/source --strip-components 1
	sed -i 's/LLAMA_BUILD_COMMON ON/LLAMA_BUILD_COMMON OFF/' .llama/source/CMakeLists.txt  # a library of its programs alone
	CMAKE_ARGS=-DLLAVA_BUILD=OFF .llama/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation .llama/source
	touch $@

test-llama-cpp: setup .llama/ready ## exported folders in llama.cpp, which is built first: 10 to 20 minutes on two cores
	LLAMA_CPP=$(CURDIR)/.llama/source/vendor/llama.cpp LLAMA_PYTHON=$(CURDIR)/.llama/bin/python $(OFFLINE) $(PY) -m pytest -q tests/test_export_gguf.py

# as .extras is built: an environment of its own that sees the packages of .venv
.pathology/ready: pathology/requirements.txt constraints.txt $(VENV)/ready
	rm -rf .pathology
	$(PY) -m venv .pathology
	$(PY) -c "$(SITE)" > $$(.pathology/bin/python -c "$(SITE)")/venv.pth
	.pathology/bin/python -m pip install --quiet --disable-pip-version-check -r pathology/requirements.txt -c constraints.txt
	touch $@

pathology: .pathology/ready clean-pathology ## synthetic slides, tiles, features, a slide model, its AUROC, a heat map: offline, in 3 minutes
	$(PATHOLOGY).synthetic demo/pathology/slides
	$(PATHOLOGY).tile demo/pathology/slides --out demo/pathology/tiles
	$(PATHOLOGY).extract demo/pathology/tiles --model random:dinov2-small --out demo/pathology/features
	OMP_NUM_THREADS=1 $(PATHOLOGY).evaluate_slides demo/pathology/features --labels demo/pathology/slides/labels.csv --external external \
	  --aggregator gated --folds 3 --out demo/pathology/model
	$(PATHOLOGY).heatmap demo/pathology/features/demo-002.h5 --model demo/pathology/model --out demo/pathology/heatmaps

clean-pathology:
	rm -rf demo/pathology

# timm in an environment of its own: its torchvision is one for CUDA, which breaks transformers beside the CPU build of PyTorch
.timm/ready: pathology/requirements-timm.txt .pathology/ready
	rm -rf .timm
	$(PY) -m venv .timm
	for python in $(PY) .pathology/bin/python; do $$python -c "$(SITE)"; done > $$(.timm/bin/python -c "$(SITE)")/venv.pth
	.timm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r pathology/requirements-timm.txt
	touch $@

test-pathology: .pathology/ready .timm/ready ## tests of pathology/, for which .venv lacks packages
	$(OFFLINE) .pathology/bin/python -m pytest -q tests/test_pathology_*.py
	$(OFFLINE) .pathology/bin/python -m pytest -q -m slow tests/test_pathology_*.py
	$(OFFLINE) PYTHONPATH=tests .timm/bin/python -m pytest -q -p torchvision_operators tests/test_pathology_timm.py

# nine minutes of steps; the next call goes on with those that are left. GPU_FLAGS=--dry-run: everything small, on a CPU
gpu: setup ## tests and benchmarks that need a GPU, and a table of them; repeat it until no step is left
	$(PY) bench/gpu.py --out results/gpu.jsonl $(GPU_FLAGS); status=$$?; \
	  $(PY) bench/gpu.py --out results/gpu.jsonl $(GPU_FLAGS) --table; exit $$status

check: setup ## ruff: style and likely mistakes
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# --isolated leaves out local wheels and indexes: a pin must resolve for anybody. This pip with fast-deps reads what packages ask for and
# downloads none; older ones download every wheel, 3 GB with those for CUDA
check-pins: setup ## the pinned versions resolve from the public package index alone
	$(PY) -m pip install --quiet --disable-pip-version-check pip==26.3
	$(PY) -m pip --isolated install --dry-run --use-feature=fast-deps --ignore-installed --quiet --disable-pip-version-check -r requirements.txt -r requirements-extras.txt -r pathology/requirements.txt -r pathology/requirements-timm.txt -c constraints.txt
