# Two targets do everything on a machine with Python, git and make: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
# a stamp for each ComfyUI that was set up
HOST_READY := .venv/ready$(subst /,-,$(COMFYUI_PATH))

.PHONY: setup demo test shows lint clean

setup: $(HOST_READY)

.venv/ready-core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch torchvision torchaudio
	$(PIP) --editable .[dev]
	touch $@

$(HOST_READY): .venv/ready-core requirements.txt scripts/comfyui.py
	$(PIP) -r "$$($(BIN)/python scripts/comfyui.py)/requirements.txt" -r requirements.txt requests torchsde
	touch $@

demo: setup
	$(BIN)/python scripts/demo.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports

test: lint
	$(BIN)/pytest tests --import-mode=importlib

# slow demonstrations; the tests have a shorter form of each
shows: setup
	$(BIN)/python tests/fuzz/fuzz_headers.py --count 10000
	$(BIN)/python benchmarks/streaming_plan.py --output output/shows/streaming_plan.json

clean:
	rm -rf .venv .cache output
