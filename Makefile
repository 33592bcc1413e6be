# The only entry points. `make run` and `make test` set up everything they need in .venv.
PYTHON ?= python3
DATA_DIR ?= data/phantom
PREDICTIONS ?=
RUN_DIR ?=
PROFILE ?= quick
SET ?=
SIZE ?= small
IMAGES ?=
SOURCE ?= phantom
SOURCE_DIR ?=
OUT ?=
PORT ?= 8501

VENV := .venv/bin
export RUNTIME ?= auto
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PYTHONWARNINGS ?= ignore::DeprecationWarning

.PHONY: run prepare evaluate xvision predict test lint bench serve demo tpu-check publish-check address clean

run: .venv/run  ## the notebooks in order: make run [DATA_DIR=...] [RUN_DIR=...] [PROFILE=full] [SET="EPOCHS=3"]
	$(VENV)/python scripts/run_notebooks.py --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile $(PROFILE) --set $(SET)

prepare: .venv/run  ## notebook 1 alone, also a part of its packing on each of several hosts: make prepare [DATA_DIR=...] [PROFILE=full] [SET="PART=3/8"]
	$(VENV)/python scripts/run_notebooks.py --only 01_prepare_data --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile $(PROFILE) --set $(SET)

evaluate: .venv/run  ## notebook 3 alone: a run again, or any model's CSV: make evaluate PREDICTIONS=file.csv [DATA_DIR=...] [RUN_DIR=...]
	$(VENV)/python scripts/run_notebooks.py --only 03_evaluate --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile $(PROFILE) --set "PREDICTIONS=$(PREDICTIONS)" $(SET)

xvision: .venv/run  ## notebook 6 alone: make xvision [SOURCE=jsrt SOURCE_DIR=folder] [RUN_DIR=...] [PROFILE=full] [SET="BACKBONES=VGG16"]
	$(VENV)/python scripts/run_notebooks.py --only 06_xvision_vgg16_nodules --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile $(PROFILE) --set "SOURCE=$(SOURCE)" "SOURCE_DIR=$(SOURCE_DIR)" $(SET)

predict: .venv/run  ## a folder of PNG, JPEG and DICOM into one CSV, resumable: make predict IMAGES=folder [RUN_DIR=...] [OUT=file.csv]
	$(VENV)/python scripts/predict.py "$(IMAGES)" --run-dir "$(RUN_DIR)" --out "$(OUT)"

test: .venv/dev  ## every test, 20 to 24 minutes on 2 cores
	$(VENV)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: .venv/dev  ## style of code and notebooks
	$(VENV)/ruff check .
	$(VENV)/ruff format --check notebooks/helpers scripts tests benchmarks serve
	$(VENV)/python scripts/stamp_notebooks.py --check

bench: .venv/dev .venv/peers/ready  ## every benchmark; results go to benchmarks/results
	for script in benchmarks/*.py; do $(VENV)/python $$script || exit 1; done

serve: .venv/serve  ## a run's model over HTTP, as TensorFlow Serving answers: make serve [RUN_DIR=...] [PORT=8501]
	$(VENV)/python serve/app.py --model "$(or $(RUN_DIR),models/densenet121)/saved_model" --port $(PORT)

demo: .venv/serve  ## a page to drop images on: make demo [RUN_DIR=...]
	$(VENV)/python serve/demo.py --model "$(or $(RUN_DIR),models/densenet121)/saved_model"

tpu-check: .venv/dev .venv/tpu/ready  ## does training start on a TPU? Answered without one, see docs/tpu.md: make tpu-check [SIZE=full]
	$(VENV)/python scripts/tpu_check.py --size $(SIZE)

publish-check: .venv/run  ## gathers RUN_DIR/hub for the Hugging Face Hub and says what it lacks; uploads nothing: make publish-check [RUN_DIR=...]
	$(VENV)/python scripts/publish_check.py --run-dir "$(RUN_DIR)"

address: .venv/run  ## after forking: make address REPOSITORY=https://github.com/you/fork
	$(VENV)/python scripts/stamp_notebooks.py --address "$(REPOSITORY)"

clean:  ## the synthetic studies, packed shards, features and the run's results; .venv stays
	rm -rf data/phantom data/phantom-nodules-* data/packed/phantom-* data/features/phantom-* models/densenet121

.venv/run: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in [(3, 11), (3, 12), (3, 13)] or sys.exit(f"Python {v[0]}.{v[1]} found, 3.11 to 3.13 needed: make run PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --quiet --upgrade pip
	$(VENV)/python -m pip install --quiet -r requirements.txt
	@touch $@

.venv/serve: .venv/run requirements-serve.txt
	$(VENV)/python -m pip install --quiet -r requirements-serve.txt
	@touch $@

.venv/dev: .venv/serve requirements-dev.txt
	$(VENV)/python -m pip install --quiet -r requirements-dev.txt
	@touch $@

.venv/peers/ready: requirements-peers.txt | .venv/run  # several gigabytes: PyTorch, for two of the benchmarks
	$(PYTHON) -m venv .venv/peers
	.venv/peers/bin/python -m pip install --quiet -r requirements-peers.txt
	@touch $@

.venv/tpu/ready: requirements-tpu-check.txt | .venv/run
	$(PYTHON) -m venv .venv/tpu
	.venv/tpu/bin/python -m pip install --quiet -r requirements-tpu-check.txt
	@touch $@
