# One command each; all of them make .venv first. PYTHON names another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/demo
STORE := sqlite:///runs/mlflow.db
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo tuner test test-slow bench clean

# torch first and pinned: an open range would take gigabytes of another build.
$(BIN)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

install: $(BIN)/.ready
	$(BIN)/steersman fetch

demo: install
	$(BIN)/steersman train --config examples/demo/train.yaml --out $(RUN)
	$(BIN)/steersman apply $(RUN)/policy.safetensors --config examples/demo/apply.yaml --out $(RUN)
	$(BIN)/steersman compare $(RUN)/policy.safetensors --config examples/demo/compare.yaml --out $(RUN)
	$(BIN)/steersman report $(RUN) --sync --mlflow $(STORE)
	@echo
	@echo "the report:       $(PYTHON) -m webbrowser file://$(CURDIR)/$(RUN)/report.html"
	@echo "the MLflow page:  $(BIN)/mlflow server --backend-store-uri $(STORE) --port 5000"
	@echo "                  then open http://127.0.0.1:5000/#/experiments/1/runs"

# The shipped tuner from scratch, under two hours on two cores; repeated, it goes on. Five agents
# with seeds of their own learn, and the best of them is kept, by jobs that are not held out.
tuner: install
	$(BIN)/python benchmarks/choose.py --config examples/default/train.yaml --out runs/default

# Everything that must hold: format, lint, types, import contracts, tests.
test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2

test-slow: install
	$(BIN)/pytest -m slow

# DACBENCH names an interpreter that has dacbench; without one that case is skipped.
bench: demo
	$(BIN)/python benchmarks/env_overhead.py
	$(BIN)/python benchmarks/callback_overhead.py
	$(BIN)/python benchmarks/demo.py --run $(RUN)
	$(BIN)/python benchmarks/speed.py $(if $(DACBENCH),--dacbench-python $(DACBENCH))
	$(BIN)/python benchmarks/page.py

clean:
	rm -rf $(VENV) build *.egg-info
