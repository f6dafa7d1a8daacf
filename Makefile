# Two targets do everything on a machine with Python, git and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# 2 for two cores, 1 for a GPU
TINY_PROCESSES ?= 2
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# a stamp for each ComfyUI that was set up
HOST_READY := .venv/ready$(subst /,-,$(COMFYUI_PATH))

.PHONY: setup demo test shows train-demo tiny lint types pictures clean

setup: $(HOST_READY)

.venv/ready-core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch torchvision torchaudio
	$(PIP) --editable .[dev]
	touch $@

$(HOST_READY): .venv/ready-core requirements.txt scripts/comfyui.py
	$(PIP) -r "$$($(BIN)/python scripts/comfyui.py)/requirements.txt" -r requirements.txt requests torchsde
	touch $@

# what checks the types of js/: nothing of it runs in the page
node_modules/.package-lock.json: package.json .venv/ready-core
	$(BIN)/npm install --no-package-lock --no-audit --no-fund --silent
	touch $@

# for the browser tests and the pictures: Debian's Chromium, unless there is a browser
.venv/ready-browser: .venv/ready-core
	test -n "$$CHROMIUM" || command -v chromium chromium-browser google-chrome \
		|| (apt-get update -qq && apt-get install -y -qq chromium) \
		|| echo "There is no Chromium, and this user cannot install it: set CHROMIUM to a browser" >&2
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py

types: node_modules/.package-lock.json
	$(BIN)/npm run --silent types

lint: setup types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python scripts/workflows.py --check

test: lint .venv/ready-browser
	$(BIN)/pytest tests --import-mode=importlib

# the pictures of the docs, the node help and the workflows, from the real page
pictures: setup .venv/ready-browser
	$(BIN)/python scripts/pictures.py

# slow demonstrations; the tests have a shorter form of each
shows: setup
	$(BIN)/python tests/fuzz/fuzz_headers.py --count 10000
	$(BIN)/python benchmarks/streaming_plan.py --output output/shows/streaming_plan.json
	$(MAKE) train-demo

# teaches the embedded model a motion from 20 clips
train-demo: setup
	$(BIN)/python scripts/train_demo.py

# the tiny checkpoint from nothing, a process for each of two cores; interrupted, it goes on from there
tiny: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m torch.distributed.run --standalone --nproc_per_node $(TINY_PROCESSES) \
		-m mochi_core.training.tiny make --out output/tiny

clean:
	rm -rf .venv .cache node_modules output
