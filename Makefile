PYTHON ?= python3
BIN := .venv/bin
SOURCES := hf_alrs tasks tests run_glue_alrs.py run_vision_alrs.py

# Small models: threads of one run get in each other's way, and much more so beside other work
SINGLE := OMP_NUM_THREADS=1

.PHONY: demo test test-slow reliability quality style

# Rebuilt whenever the dependencies change
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

# The main job on the built-in text sample, then eight schedulers by three seeds on the built-in digits
demo: .venv/installed
	$(SINGLE) $(BIN)/python run_glue_alrs.py --dataset_name sample --output_dir outputs/demo
	$(SINGLE) $(BIN)/python run_vision_alrs.py --dataset_name sample --output_dir outputs/demo-comparison --seeds 0 1 2 \
		--schedulers alrs constant linear step exponential reduce_lr_on_plateau prodigy schedule_free

test: .venv/installed
	$(SINGLE) $(BIN)/python -m pytest

test-slow: .venv/installed
	$(SINGLE) $(BIN)/python -m pytest -m slow

# Every fault and equivalence case with its outcome, slow ones too
reliability: .venv/installed
	$(SINGLE) $(BIN)/python -m pytest -m reliability

quality: .venv/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: .venv/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
