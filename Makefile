# make test      everything that is checked, on a fresh clone too
# make tables    Table 1 on built-in surfaces; DATA=… TEXTURES=… PROFILE=paper for other data
# make benchmark  ratios against plain PyTorch and against the bare extractor; DATA=… TEXTURES=… as above
# make prepare   after editing notebooks: clean them, export cse/, write README.md
# make clean     remove what the above made, results excepted
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PROFILE ?= smoke
TABLES ?= table1_mvtec
DATA ?= $(MVTEC)
TEXTURES ?= $(DTD)
name := $(if $(DATA),$(notdir $(patsubst %/,%,$(DATA))),built-in)
given = $(if $(2),-p $(1) '$(2)')
parameters = $(call given,data,$(DATA)) $(call given,textures,$(TEXTURES)) $(call given,extractor,$(EXTRACTOR)) $(call given,weights,$(WEIGHTS)) \
  $(call given,categories,$(CATEGORIES)) $(call given,methods,$(METHODS)) $(call given,seeds,$(SEEDS)) $(call given,force,$(FORCE)) $(call given,device,$(DEVICE))

# an executed notebook keeps its parameters; where data lies on this machine is nobody's business
hide_paths = sed -i -e '' $(if $(DATA),-e 's|$(abspath $(DATA))|$(name)|g') $(if $(TEXTURES),-e 's|$(abspath $(TEXTURES))|$(notdir $(abspath $(TEXTURES)))|g')

.PHONY: test tables benchmark prepare clean

# one pip run resolves everything, so that torch is fetched once
$(READY): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

test: export CUDA_VISIBLE_DEVICES :=
test: $(READY)
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/nbdev_test --n_workers 2
	timeout 1800 $(BIN)/python -m pytest -q tests

papermill = $(BIN)/papermill -k python3 --no-progress-bar --log-output --log-level WARNING --stdout-file /dev/stdout

tables: $(READY)
	@mkdir -p results/notebooks; failed=0; for t in $(TABLES); do \
	  out=results/notebooks/$$t-$(name)-$(PROFILE).ipynb; \
	  $(papermill) nbs/tables/$$t.ipynb $$out -f params/$(PROFILE).yml $(parameters) || failed=1; \
	  $(BIN)/nbdev_clean --fname $$out; $(hide_paths) $$out; done; exit $$failed

benchmark: $(READY)
	@mkdir -p results/notebooks
	$(papermill) nbs/23_benchmark.ipynb results/notebooks/benchmark-$(name).ipynb -p quick False -p results results/benchmark-$(name) \
	  $(call given,data,$(DATA)) $(call given,textures,$(TEXTURES))
	$(BIN)/nbdev_clean --fname results/notebooks/benchmark-$(name).ipynb
	$(hide_paths) results/notebooks/benchmark-$(name).ipynb

prepare: $(READY)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --RegexRemovePreprocessor.patterns='^\s*#\|\s*hide' \
	  --output-dir . --output README nbs/index.ipynb

clean:
	rm -rf $(VENV) *.egg-info build dist .pytest_cache
