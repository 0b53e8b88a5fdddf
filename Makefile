# make test      everything that is checked, on a fresh clone too
# make tables    Tables 1–5 on built-in surfaces; PROFILE=paper MVTEC=… TILDA=… DTD=… for the published setting, TABLES=… for some of them, METHODS=all with every baseline, SCHEDULER=processes or an address
#                TABLES=table6_text_against_code ROWS=… SEEDS=3: where text and code differ, one choice at a time
# make benchmark  ratios against plain PyTorch and against the bare extractor; DATA=… TEXTURES=… as above
# make false-alarm-rates  false-alarm rates asked for and measured; DATA=… TEXTURES=… SEEDS=…
# make seed-variance  sources of the variance between seeds, and which epoch to keep; DATA=… TEXTURES=… SEEDS=…
# make model-selection  settings selected without test images and without the tested surface;
#                DATA=… TEXTURES=… SEEDS=… EVIDENCE_SEEDS=… METHODS=… PROFILES=…
# make robustness  bad input, damaged files, properties, killed and doubled grids, with counts; the report page in a browser
# make cluster-test  workers that are killed and hang, overhead and efficiency of scheduling, with counts
# make report    results/report/index.html: all results on one page that needs no network
# make prepare   after editing notebooks: clean them, export cse/, write README.md
# make clean     remove what the above made, results excepted
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PROFILE ?= smoke
TABLES ?= table1_mvtec table2_tilda table3_speed table4_classifier table5_decoder
DATA ?= $(MVTEC)
TEXTURES ?= $(DTD)
# Table 2 has data of its own
data = $(if $(filter table2_tilda,$(1)),$(TILDA),$(DATA))
name = $(if $(call data,$(1)),$(notdir $(patsubst %/,%,$(call data,$(1)))),built-in)
given = $(if $(2),-p $(1) '$(2)')
# among several tables, Table 3 keeps its own extractor, weights and methods, and Table 2 its own categories
unless = $(if $(and $(filter $(1),$(2)),$(filter-out $(1),$(TABLES))),,$(3))
parameters = $(call given,data,$(call data,$(1))) $(call given,textures,$(TEXTURES)) \
  $(call given,extractor,$(call unless,table3_speed,$(1),$(EXTRACTOR))) $(call given,weights,$(call unless,table3_speed,$(1),$(WEIGHTS))) \
  $(call given,methods,$(or $(call unless,table3_speed,$(1),$(METHODS)),$(if $(filter table3_speed,$(1)),all))) $(call given,categories,$(call unless,table2_tilda,$(1),$(CATEGORIES))) \
  $(call given,seeds,$(SEEDS)) $(call given,force,$(FORCE)) $(call given,device,$(DEVICE)) $(call given,scheduler,$(SCHEDULER)) $(if $(filter table6%,$(1)),-p rows '$(ROWS)')

# an executed notebook keeps its parameters; where data lies on this machine is nobody's business
hide = $(if $(findstring /,$(1)),-e 's|$(abspath $(1))|$(notdir $(abspath $(1)))|g' -e 's|$(1)|$(notdir $(abspath $(1)))|g')
hide_paths = sed -i -e '' $(foreach path,$(DATA) $(TILDA) $(TEXTURES) $(WEIGHTS),$(call hide,$(path)))

.PHONY: test tables benchmark false-alarm-rates seed-variance model-selection robustness cluster-test report prepare clean

# one pip run resolves everything, so that torch is fetched once
$(READY): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cluster,dev,export,baselines,report]'
	touch $@

test: export CUDA_VISIBLE_DEVICES :=
# glibc keeps the memory of large tensors; to return it and fetch it again page by page takes a tenth of the time
test: export MALLOC_MMAP_THRESHOLD_ := 4000000000
test: export MALLOC_TRIM_THRESHOLD_ := 4000000000
test: $(READY)
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python -m pytest -q -n 2 --dist loadfile tests

papermill = $(BIN)/papermill -k python3 --no-progress-bar --log-output --log-level WARNING --stdout-file -

define table
out=results/notebooks/$(1)-$(call name,$(1))-$(PROFILE).ipynb; \
$(papermill) nbs/tables/$(1).ipynb $$out -f params/$(PROFILE).yml $(call parameters,$(1)) || failed="$$failed $(1)"; \
$(BIN)/nbdev_clean --fname $$out; $(hide_paths) $$out;
endef

tables: $(READY)
	@mkdir -p results/notebooks; failed=; $(foreach t,$(TABLES),$(call table,$(t))) test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

benchmark: $(READY)
	@mkdir -p results/notebooks
	$(papermill) nbs/lab/16_benchmark.ipynb results/notebooks/benchmark-$(call name,).ipynb -p quick False -p results results/benchmark-$(call name,) \
	  $(call given,data,$(DATA)) $(call given,textures,$(TEXTURES))
	$(BIN)/nbdev_clean --fname results/notebooks/benchmark-$(call name,).ipynb
	$(hide_paths) results/notebooks/benchmark-$(call name,).ipynb

robustness: $(READY)
	ROBUSTNESS_KILLS=20 $(BIN)/python -m pytest -q tests/test_bad_input.py tests/test_detector.py tests/test_engines.py tests/test_properties.py tests/test_robustness.py \
	  tests/test_report_page.py tests/test_baselines.py

cluster-test: $(READY)
	CLUSTER_RUNS=2000 $(BIN)/python -m pytest -q tests/test_cluster.py

# notebooks beside the tables: one run each, of which there is one executed copy a data set
false-alarm-rates seed-variance model-selection: $(READY)
	@mkdir -p results/notebooks
	$(papermill) nbs/tables/$(subst -,_,$@).ipynb results/notebooks/$@-$(call name,).ipynb -p settings '{}' -p categories '$(CATEGORIES)' -p results results \
	  $(call given,data,$(DATA)) $(call given,textures,$(TEXTURES)) $(call given,seeds,$(SEEDS)) $(call given,device,$(DEVICE)) \
	  $(if $(filter model-selection,$@),$(call given,methods,$(METHODS)) $(call given,profiles,$(PROFILES)) $(call given,evidence_seeds,$(EVIDENCE_SEEDS)),-p profile $(PROFILE))
	$(BIN)/nbdev_clean --fname results/notebooks/$@-$(call name,).ipynb
	$(hide_paths) results/notebooks/$@-$(call name,).ipynb

report: $(READY)
	$(BIN)/python -c 'from cse.lab.report_page import write_page; print(write_page())'

prepare: $(READY)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --RegexRemovePreprocessor.patterns='^\s*#\|\s*hide' \
	  --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_input_tags=remove_input --NbConvertApp.output_files_dir=nbs/images \
	  --output-dir . --output README nbs/index.ipynb
	sed -i -E 's#\]\(([0-9]|(data|fast|extensions|baselines|deploy|lab|tutorials|tables)/)#](nbs/\1#g; s#\]\(\.\./#](#g' README.md

clean:
	rm -rf $(VENV) *.egg-info build dist .pytest_cache
