# The only entry points. `make run` and `make test` set up everything they need in .venv.
# The newest supported Python that can make an environment: what is on the PATH may be a shim that fails, or lack parts.
PYTHON ?= $(shell for name in python3.13 python3.12 python3.11; do \
	$$name -c 'import ensurepip, venv' 2>/dev/null && echo $$name && exit; done; echo python3)
PINS ?=
DATA_DIR ?=
PREDICTIONS ?=
RUN_DIR ?=
PROFILE ?=
SET ?=
SEEDS ?= 5
SIZE ?= small
IMAGES ?=
SOURCE ?= phantom
SOURCE_DIR ?=
OUT ?=
# Not from the environment: machines of a cluster may have a variable of this name.
CLUSTER =
PORT ?= 8501

ENV ?= .venv
VENV := $(ENV)/bin
PRINT_VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
# pip of an environment, with the releases that were tested together on its Python, which may be another than PYTHON now.
# PINS=newest takes the newest that requirements.txt allows.
install = $(1)/python -m pip install --quiet \
	$(if $(filter newest,$(PINS)),,-c requirements/constraints-$$($(1)/python $(PRINT_VERSION)).txt)
export RUNTIME ?= auto
export TF_CPP_MIN_LOG_LEVEL ?= 2
export PYTHONWARNINGS ?= ignore::DeprecationWarning

# Ray, where one of the targets that can use a cluster is given one.
cluster := $(if $(CLUSTER),$(ENV)/cluster)

# Make ignores variables that it does not know, so `make run EPOCHS=3` would train the defaults. What a target does not take is
# refused on the command line; the environment may hold anything.
study := DATA_DIR RUN_DIR PROFILE SET
takes-run := $(study)
takes-train := $(study)
takes-prepare := CLUSTER $(study)
takes-seeds := SEEDS $(study)
takes-evaluate := PREDICTIONS $(study)
takes-xvision := SOURCE SOURCE_DIR CLUSTER $(study)
takes-predict := IMAGES RUN_DIR OUT CLUSTER
takes-results := RUN_DIR MACHINE_WAS
takes-reference := PREDICTIONS DATA_DIR
takes-serve := RUN_DIR PORT
takes-demo := RUN_DIR
takes-tpu-check := SIZE
takes-publish-check := RUN_DIR
takes-publish := RUN_DIR NAME
takes-report := RUN_DIR NAME
takes-address := REPOSITORY
goals := $(or $(MAKECMDGOALS),run)
takes := $(foreach goal,$(goals),$(takes-$(goal)))
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
unknown := $(filter-out $(takes) ENV PINS RUNTIME KERAS_% TF_% PYTHON% SHELL MAKE%,$(given))
is-setting = $(and $(filter SET,$(takes)),$(filter-out PREDICTIONS,$(1)),$(shell grep -s '"$(1)"' notebooks/helpers/runtime/settings.py))
settings := $(foreach name,$(unknown),$(if $(call is-setting,$(name)),$(name)))
$(if $(unknown),$(error `make $(goals)` takes $(or $(strip $(takes)),no variable), not $(unknown). $(if $(settings),Settings of \
	notebooks go into SET="$(foreach name,$(settings),$(name)=$($(name)))". )Variables of the environment go before `make`))

.PHONY: run prepare train seeds evaluate xvision predict test test-fast lint results reference pins bench serve demo tpu-check publish-check publish report address clean

run: $(ENV)/run  ## the notebooks in order: make run [DATA_DIR=...] [RUN_DIR=...] [PROFILE=full|best] [SET="EPOCHS=3"]
	$(VENV)/python scripts/run_notebooks.py --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile "$(PROFILE)" --set $(SET)

prepare: $(ENV)/run $(cluster)  ## notebook 1 alone, also on a Ray cluster: make prepare [CLUSTER=auto|ADDRESS] [DATA_DIR=...] [PROFILE=full|best] [SET="SIDE=320"]
	$(VENV)/python scripts/run_notebooks.py --only 01_prepare_data --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile "$(PROFILE)" --set "CLUSTER=$(CLUSTER)" $(SET)

train: $(ENV)/run  ## notebook 2 alone, also by a launcher on each of several hosts: srun make train RUNTIME=jax [DATA_DIR=...] [RUN_DIR=...] [PROFILE=full|best]
	$(VENV)/python scripts/run_notebooks.py --only 02_train_densenet121 --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile "$(PROFILE)" --set $(SET)

seeds: $(ENV)/run  ## trains several seeds, or resumes; mean, spread, their average: make seeds [SEEDS=5] [DATA_DIR=...] [RUN_DIR=...] [PROFILE=full] [SET="VIEWS=25"]
	$(VENV)/python scripts/train_seeds.py --seeds $(SEEDS) --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile "$(PROFILE)" --set $(SET)

evaluate: $(ENV)/run  ## notebook 3 alone: a run again, or any model's CSV: make evaluate PREDICTIONS=file.csv [DATA_DIR=...] [RUN_DIR=...]
	$(VENV)/python scripts/run_notebooks.py --only 03_evaluate --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile "$(PROFILE)" --set "PREDICTIONS=$(PREDICTIONS)" $(SET)

xvision: $(ENV)/run $(cluster)  ## notebook 6 alone: make xvision [SOURCE=folder SOURCE_DIR=/path/to/images] [CLUSTER=auto|ADDRESS] [RUN_DIR=...] [PROFILE=full] [SET="BACKBONES=VGG16"]
	$(VENV)/python scripts/run_notebooks.py --only 06_xvision_vgg16_nodules --data-dir "$(DATA_DIR)" --run-dir "$(RUN_DIR)" --profile "$(PROFILE)" --set "SOURCE=$(SOURCE)" "SOURCE_DIR=$(SOURCE_DIR)" "CLUSTER=$(CLUSTER)" $(SET)

predict: $(ENV)/run $(cluster)  ## a folder of PNG, JPEG and DICOM into one CSV, resumable: make predict IMAGES=folder [RUN_DIR=...] [OUT=file.csv] [CLUSTER=auto|ADDRESS]
	$(VENV)/python scripts/predict.py "$(IMAGES)" --run-dir "$(RUN_DIR)" --out "$(OUT)" --cluster "$(CLUSTER)"

test-fast: $(ENV)/dev  ## the tests to run before a commit: about 2 minutes on 2 cores
	$(VENV)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test: $(ENV)/dev  ## every test: 12 to 20 minutes on 2 cores
	$(VENV)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(ENV)/dev  ## style of code and notebooks
	$(VENV)/ruff check .
	$(VENV)/ruff format --check notebooks/helpers scripts tests benchmarks serve
	$(VENV)/python scripts/stamp_notebooks.py --check

results: $(ENV)/dev  ## copies a finished run into docs/quick_run and renews the tables of README and docs: make results [MACHINE_WAS="otherwise idle"]
	$(VENV)/python scripts/renew_results.py --run-dir "$(or $(RUN_DIR),models/densenet121)" $(if $(MACHINE_WAS),--machine-was "$(MACHINE_WAS)")

reference: $(ENV)/dev  ## renews docs/reference_evaluation: make reference PREDICTIONS=preds.csv DATA_DIR=/path/to/nih
	$(VENV)/python scripts/evaluate_reference.py "$(PREDICTIONS)" --data-dir "$(DATA_DIR)"

pins: $(ENV)/run  ## resolves requirements/constraints-*.txt anew
	$(VENV)/python -m pip install --quiet uv
	for version in 3.11 3.12 3.13; do $(VENV)/uv pip compile --quiet --upgrade --no-header --no-annotate \
		--no-emit-index-url --no-emit-find-links --python-version $$version --python-platform x86_64-manylinux_2_31 \
		--output-file requirements/constraints-$$version.txt requirements.txt \
		$(filter-out requirements/constraints-%,$(wildcard requirements/*.txt)) || exit 1; done

bench: $(ENV)/dev $(ENV)/peers/ready  ## every benchmark; results go to benchmarks/results
	for script in benchmarks/*.py; do $(VENV)/python $$script || exit 1; done

serve: $(ENV)/serve  ## a run's model over HTTP, as TensorFlow Serving answers: make serve [RUN_DIR=...] [PORT=8501]
	$(VENV)/python serve/app.py --model "$(or $(RUN_DIR),models/densenet121)/saved_model" --port $(PORT)

demo: $(ENV)/serve  ## a page to drop images on: make demo [RUN_DIR=...]
	$(VENV)/python serve/demo.py --model "$(or $(RUN_DIR),models/densenet121)/saved_model"

tpu-check: $(ENV)/dev $(ENV)/tpu/ready  ## does training start on a TPU? Answered without one, see docs/tpu.md: make tpu-check [SIZE=full]
	$(VENV)/python benchmarks/tpu/check.py --size $(SIZE)

publish-check: $(ENV)/run  ## gathers RUN_DIR/hub for the Hugging Face Hub and says what it lacks; uploads nothing: make publish-check [RUN_DIR=...]
	$(VENV)/python scripts/publish_check.py --run-dir "$(RUN_DIR)"

publish: $(ENV)/run  ## the same, and uploads it with your own token, if it is complete: make publish NAME=your_name/model [RUN_DIR=...]
	@test -n "$(NAME)" || { echo "make publish needs NAME=your_name/model, the model on the Hugging Face Hub"; exit 1; }
	$(call install,$(VENV)) huggingface_hub
	$(VENV)/python scripts/publish_check.py --run-dir "$(RUN_DIR)" --upload "$(NAME)"

report: $(ENV)/run  ## a finished run's report, in docs/runs, see CONTRIBUTING.md: make report NAME=nih-full-v5e8 [RUN_DIR=...]
	$(VENV)/python scripts/make_report.py --run-dir "$(RUN_DIR)" --name "$(NAME)"

address: $(ENV)/run  ## after forking: make address REPOSITORY=https://github.com/you/fork
	$(VENV)/python scripts/stamp_notebooks.py --address "$(REPOSITORY)"

clean:  ## the synthetic studies, packed shards, features and the run's results; .venv stays
	rm -rf data/phantom data/phantom-nodules-* data/packed/phantom-* data/features/phantom-* models/densenet121

$(ENV)/run: requirements.txt
	@version=$$($(PYTHON) $(PRINT_VERSION)); case $$version in 3.11|3.12|3.13) ;; \
		*) echo "Python $$version found, 3.11 to 3.13 needed: make run PYTHON=python3.12"; exit 1;; esac
	$(PYTHON) -m venv $(ENV)
	$(VENV)/python -m pip install --quiet --upgrade pip
	$(call install,$(VENV)) -r requirements.txt
	@touch $@

$(ENV)/serve: $(ENV)/run requirements/serve.txt
	$(call install,$(VENV)) -r requirements/serve.txt
	@touch $@

$(ENV)/cluster: $(ENV)/run requirements/cluster.txt
	$(call install,$(VENV)) -r requirements/cluster.txt
	@touch $@

$(ENV)/dev: $(ENV)/serve requirements/dev.txt
	$(call install,$(VENV)) -r requirements/dev.txt
	@touch $@

$(ENV)/peers/ready: requirements/peers.txt | $(ENV)/run  # several gigabytes: PyTorch, for two of the benchmarks
	$(PYTHON) -m venv $(ENV)/peers
	$(call install,$(ENV)/peers/bin) -r requirements/peers.txt
	@touch $@

$(ENV)/tpu/ready: requirements/tpu.txt | $(ENV)/run
	$(PYTHON) -m venv $(ENV)/tpu
	$(call install,$(ENV)/tpu/bin) -r requirements/tpu.txt
	@touch $@
