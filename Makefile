# make demo · make speedrun · make test · make slow · make native · make cluster · make faults · make lint ·
# make mutants · make bench · make finetune-report · make ablations TEXT=FILE: each makes the environment that it needs in .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PARALLEL := -n 2 --dist worksteal
TEXT ?= ../shared/data/tinyshakespeare.txt

.PHONY: demo speedrun test slow native cluster faults lint mutants bench ablations finetune-report clean

demo: $(VENV)/installed
	$(BIN)/python train.py configs/demo.yaml
	$(BIN)/python sample.py --run_dir runs/demo --prompt "def get_name(" --prompt "class Reader(" --prompt "    def __init__(self" \
		--num_samples 1 --max_new_tokens 100 --temperature 0.7 --top_p 0.9 --repetition_penalty 1.1 --seed 1

# From text to a model that answers: pretraining with a tokenizer of its own, evaluation, instructions, report.
speedrun: $(VENV)/installed
	$(BIN)/gptjax train configs/speedrun.yaml
	$(BIN)/gptjax evaluate --run_dir runs/speedrun --windows 256
	$(BIN)/python configs/finetune/make_rows.py
	$(BIN)/gptjax train configs/finetune/docstrings.yaml --init_from runs/speedrun --run_dir runs/speedrun_chat
	$(BIN)/gptjax sample --run_dir runs/speedrun_chat --prompt "def is_empty(self):" --prompt "def read_lines(path):" \
		--prompt "def close(self):" --num_samples 1 --max_new_tokens 40 --temperature 0
	$(BIN)/gptjax report runs/speedrun runs/speedrun_chat --out runs/speedrun.html

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# Those of native and cluster, thousands of fuzz cases and hundreds of kills are left to their own targets.
slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m slow --ignore tests/cluster --ignore tests/faults/test_cluster.py \
		--ignore tests/faults/test_storm.py --ignore tests/fuzz --ignore tests/test_native_library.py \
		--ignore tests/test_parallel.py --ignore tests/test_plan.py

native: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m slow tests/test_native_library.py

cluster: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) -m slow tests/test_parallel.py tests/test_plan.py tests/cluster tests/faults/test_cluster.py

faults: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PARALLEL) tests/faults --fault-table docs/experiments/faults.md

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

mutants: $(VENV)/installed-dev
	$(BIN)/python bench/mutants.py

ablations: $(VENV)/installed
	$(BIN)/python bench/ablations.py $(TEXT)

finetune-report: $(VENV)/installed-dev
	$(BIN)/python bench/finetune_report.py

bench: $(VENV)/installed-bench
	$(BIN)/python bench/run.py

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"gptjax needs Python 3.11 or newer, this is {sys.version}"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/installed

# PyTorch first and by version: a plain `torch` may bring gigabytes of GPU libraries.
$(VENV)/installed-bench: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[dev,bench]'
	touch $@ $(VENV)/installed $(VENV)/installed-dev

clean:
	rm -rf $(VENV)
