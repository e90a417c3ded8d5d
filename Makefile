PYTHON ?= python3
BIN := .venv/bin
SOURCES := hf_alrs tasks tests run_glue_alrs.py run_vision_alrs.py

# Small models: threads of one run get in each other's way, and much more so beside other work
SINGLE := OMP_NUM_THREADS=1

# Folder with sst2/, imdb/, cifar10/ and titanic/train.csv, and of a pretrained encoder; without them the Hub is asked. The
# Hub has no Titanic: without DATA the plans that have it stop before their first run, unless it is left out by SKIP=titanic
DATA ?=
MODEL ?=
# Studies to leave out, by name, in the plans that have them
SKIP ?=
JOBS ?= 2
PLAN_OPTIONS = $(if $(DATA),--data_dir $(DATA)) $(if $(MODEL),--model_name_or_path $(MODEL)) $(if $(SKIP),--skip_studies $(SKIP)) --jobs $(JOBS) $(OPTIONS)
EVIDENCE := $(BIN)/hf-alrs evidence

.PHONY: demo test test-slow reliability quality style evidence evidence-full arena arena-small ablation

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
	$(SINGLE) $(BIN)/python -m pytest -n $(JOBS) --dist loadscope

test-slow: .venv/installed
	$(SINGLE) $(BIN)/python -m pytest -m slow

# Every fault and equivalence case with its outcome, slow ones too
reliability: .venv/installed
	$(SINGLE) $(BIN)/python -m pytest -m reliability

# The plans of both reports at a size for two CPU cores, about two hours, and all of SST-2 and of CIFAR-10, which are for a GPU
# (SKIP="sst2-all cifar10-resnet18-all" leaves them out); what is stored is not run again.
# What fails in one does not keep the other from running; it is told by the exit code at the end
evidence: .venv/installed
	status=0; \
	$(EVIDENCE) --plan report-1 --output_dir results/report-1-adaptive-scheduling $(PLAN_OPTIONS) || status=1; \
	$(EVIDENCE) --plan report-2 --output_dir results/report-2-meta-learning $(PLAN_OPTIONS) || status=1; \
	$(EVIDENCE) --update_readme || status=1; \
	exit $$status

# The whole plans, for a GPU; every run is started by the launcher
LAUNCHER ?= $(BIN)/accelerate launch
evidence-full: JOBS := 1
evidence-full: .venv/installed
	status=0; \
	$(EVIDENCE) --plan report-1-full --output_dir outputs/evidence-full/report-1-adaptive-scheduling $(PLAN_OPTIONS) --launcher "$(LAUNCHER)" || status=1; \
	$(EVIDENCE) --plan report-2-full --output_dir outputs/evidence-full/report-2-meta-learning $(PLAN_OPTIONS) --launcher "$(LAUNCHER)" || status=1; \
	exit $$status

# ALRS beside everything else on the tasks of both reports: hours, or under ten minutes. And what each of its parts brings
arena arena-small ablation: .venv/installed
	$(EVIDENCE) --plan $@ --output_dir outputs/$@ $(PLAN_OPTIONS)

quality: .venv/installed
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

style: .venv/installed
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)
