# make test      everything that is checked, on a fresh clone too
# make tables    Table 1 on built-in surfaces; DATA=… TEXTURES=… PROFILE=paper for other data
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

.PHONY: test tables prepare clean

# one pip run resolves everything, so that torch is fetched once
$(READY): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

test: $(READY)
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/nbdev_test --n_workers 2
	timeout 1800 $(BIN)/python -m pytest -q tests

tables: $(READY)
	@mkdir -p results/notebooks; failed=0; for t in $(TABLES); do \
	  out=results/notebooks/$$t-$(name)-$(PROFILE).ipynb; \
	  $(BIN)/papermill nbs/tables/$$t.ipynb $$out -k python3 --no-progress-bar --log-output --log-level WARNING --stdout-file /dev/stdout \
	    -f params/$(PROFILE).yml $(parameters) || failed=1; \
	  $(BIN)/nbdev_clean --fname $$out; done; exit $$failed

prepare: $(READY)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --RegexRemovePreprocessor.patterns='^\s*#\|\s*hide' \
	  --output-dir . --output README nbs/index.ipynb

clean:
	rm -rf $(VENV) *.egg-info build dist .pytest_cache
