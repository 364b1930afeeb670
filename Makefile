# make install: set up .venv. make demo: one image from two ranks on this machine. make test: the tests.
# Each target sets up .venv by itself.
PYTHON ?= python3
PORT ?= 6000
BIN := .venv/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
# else every process of every host under test would compile our sources anew
export PYTHONDONTWRITEBYTECODE :=

.PHONY: install demo test test-all lint docs comfyui audit clean

install: .venv/installed

demo: .venv/installed
	$(BIN)/python -m demo --port=$(PORT) $(if $(ONCE),--once)

test: .venv/installed
	$(BIN)/python -m pytest -m "not gpu and not slow" --numprocesses=3 --dist=loadfile --no-loadscope-reorder --durations=30

test-all: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# docs/arguments.md, and the generated parts of the README
docs: .venv/installed
	$(BIN)/python -m hosts.launch.readme

# dist/comfyui: the nodes with the client that they import, as ComfyUI's registry takes them
comfyui:
	rm -rf dist/comfyui
	mkdir -p dist/comfyui
	cp -r clients/comfyui/*.py clients/comfyui/pyproject.toml clients/comfyui/README.md \
		clients/comfyui/workflows clients/python/diffusion_client LICENSE dist/comfyui
	find dist/comfyui -name __pycache__ -prune -exec rm -r {} +

# known vulnerabilities of the pinned dependencies, by a tool with an environment of its own
audit:
	$(PYTHON) -m venv .venv/audit
	PIP_CONSTRAINT= .venv/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	.venv/audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip

.venv/installed: setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[options,ray,test]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
