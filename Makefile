# make test      all checks, also on a fresh clone
# make tables    computes Tables 1–5 again, on built-in data, into results/runs, and compares them with results/reference. Interrupted
#                work is resumed; FRESH=1 starts over. PROFILE=paper MVTEC=… TILDA=… DTD=…: the published setting. TABLES='1 4': some of
#                the tables. METHODS=all: every baseline too; patchcore/repaired: PatchCore with the
#                settings of that profile. SCHEDULER=processes, or an address
# make reference  a folder of runs becomes the reference, after an audit: RUNS=results/runs/built-in-smoke
# make text-against-code  Table 6: where text and released code differ, one choice at a time; ROWS=… SEEDS=3
# make benchmark  times as ratios to plain PyTorch and to the bare extractor; DATA=… TEXTURES=…
# make gpu-check  on a machine with an NVIDIA GPU: what must be reached there, a line for each target, in eight minutes, and
#                results/reference/gpu.json; DATA=… TEXTURES=…
# make false-alarm-rates  requested and measured false-alarm rates; DATA=… TEXTURES=… SEEDS=…
# make seed-variance  sources of the variance between seeds, and which epoch to keep; DATA=… TEXTURES=… SEEDS=…
# make model-selection  settings selected without test images and without the tested surface;
#                DATA=… TEXTURES=… SEEDS=… EVIDENCE_SEEDS=… METHODS=… PROFILES=…
# make training-curves  AUROC over the epochs of training, one thing changed at a time; DATA=… TEXTURES=… SEEDS=3 VARIATIONS='no decoder,…'
#                EXTRACTOR=… WEIGHTS=… SETTINGS='{"resize": 224}' IMAGES=40 RESULTS=results/runs/whole-images
# make spread    standard deviation of AUROC between machines and between seeds, for the comparison with the reference
# make robustness  bad input, damaged files, properties, grids that are killed or run twice at once, threads and processes, with counts;
#                report pages in a browser, and the demo page if gradio is installed (extra demo)
# make cluster-test  workers that are killed or hang, overhead and efficiency of scheduling, with counts
# make report    results/report/index.html: the reference on one page that needs no network
# make docs      docs/_build/html/index.html: the site, from the notebooks and their stored outputs; every page is opened in a browser
#                if Chromium is installed
# make prepare   after editing notebooks: clean them, export cse/, write README.md with numbers read from results/reference
# make clean     remove what the other targets made, except results
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

PROFILE ?= smoke
DATA ?= $(MVTEC)
TEXTURES ?= $(DTD)
NAME = $(if $(DATA),$(notdir $(patsubst %/,%,$(DATA))),built-in)

# a variable that a target does not take is refused: it would change nothing
VARIABLES := PROFILE TABLES DATA TEXTURES MVTEC TILDA DTD EXTRACTOR WEIGHTS METHODS CATEGORIES SEEDS FORCE FRESH DEVICE SCHEDULER ROWS \
  EVIDENCE_SEEDS PROFILES RUNS SETTINGS RESULTS VARIATIONS IMAGES
takes = $(foreach v,$(filter-out $(1),$(VARIABLES)),$(if $(findstring command,$(origin $(v))),$(error make $@ does not take $(v); \
  expected $(if $(strip $(1)),some of $(1),no variable))))
COMMON := DATA TEXTURES MVTEC DTD CATEGORIES SEEDS DEVICE
option = $(if $($(2)),$(1) '$($(2))')
parameter = $(if $($(2)),-p $(1) '$($(2))')

.PHONY: test tables reference text-against-code benchmark false-alarm-rates seed-variance model-selection training-curves spread robustness cluster-test gpu-check report docs prepare clean

# one pip run resolves everything, so that torch is fetched once
$(READY): settings.ini setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[cluster,dev,export,baselines,report]'
	touch $@

test: export CUDA_VISIBLE_DEVICES :=
# glibc keeps the memory of large tensors: returning it and fetching it again, page by page, takes a tenth of the time
test: export MALLOC_MMAP_THRESHOLD_ := 4000000000
test: export MALLOC_TRIM_THRESHOLD_ := 4000000000
test: $(READY)
	$(call takes,)
	$(BIN)/ruff check
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/nbdev_test --n_workers 2
# some tests wait for processes, so three workers keep two cores busy
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python -m pytest -q -n 3 --dist loadfile tests

tables: $(READY)
	$(call takes,PROFILE TABLES TILDA EXTRACTOR WEIGHTS METHODS SCHEDULER FRESH $(COMMON))
	$(BIN)/cse tables $(TABLES) --notebooks nbs/tables --profile '$(PROFILE)' $(if $(FRESH),--fresh) $(call option,--data,DATA) \
	  $(call option,--tilda,TILDA) $(call option,--textures,TEXTURES) $(call option,--extractor,EXTRACTOR) $(call option,--weights,WEIGHTS) \
	  $(call option,--methods,METHODS) $(call option,--categories,CATEGORIES) $(call option,--seeds,SEEDS) \
	  $(call option,--device,DEVICE) $(call option,--scheduler,SCHEDULER)

reference: $(READY)
	$(call takes,RUNS)
	$(BIN)/python -c 'from cse.lab.reference import main; main()' '$(RUNS)'

# notebooks other than those of Tables 1 to 5: one papermill run each
papermill = mkdir -p '$(2)/notebooks' && $(BIN)/papermill -k python3 --no-progress-bar --log-output --log-level WARNING --stdout-file - \
  $(1) '$(2)/notebooks/$(notdir $(1))' -p results '$(2)' $(call parameter,data,DATA) $(call parameter,textures,TEXTURES)
shared = $(call parameter,seeds,SEEDS) $(call parameter,device,DEVICE) -p settings '{}' -p categories '$(CATEGORIES)'

benchmark: $(READY)
	$(call takes,DATA TEXTURES MVTEC DTD)
	$(call papermill,nbs/lab/16_benchmark.ipynb,results/runs/$@-$(NAME)) -p quick False

# nothing is installed where there is no GPU
gpu-check:
	$(call takes,DATA TEXTURES MVTEC DTD)
	@nvidia-smi -L 2>/dev/null | grep -q GPU || { \
	  echo 'error: make gpu-check needs an NVIDIA GPU and its driver, and nvidia-smi finds none on this machine' >&2; exit 1; }
	@$(MAKE) --no-print-directory $(READY)
	@$(BIN)/python -c 'from cse.lab.gpu_check import main; main()' '$(DATA)' '$(TEXTURES)'

text-against-code: $(READY)
	$(call takes,PROFILE EXTRACTOR WEIGHTS ROWS SCHEDULER $(COMMON))
	$(call papermill,nbs/tables/table6_text_against_code.ipynb,results/runs/$@-$(NAME)-$(PROFILE)) $(shared) -p profile '$(PROFILE)' \
	  $(call parameter,extractor,EXTRACTOR) $(call parameter,weights,WEIGHTS) -p rows '$(ROWS)' $(call parameter,scheduler,SCHEDULER)

false-alarm-rates seed-variance: $(READY)
	$(call takes,PROFILE $(COMMON))
	$(call papermill,nbs/tables/$(subst -,_,$@).ipynb,results/runs/$@-$(NAME)-$(PROFILE)) $(shared) -p profile '$(PROFILE)'

model-selection: $(READY)
	$(call takes,METHODS PROFILES EVIDENCE_SEEDS $(COMMON))
	$(call papermill,nbs/tables/$(subst -,_,$@).ipynb,results/runs/$@-$(NAME)) $(shared) $(call parameter,methods,METHODS) \
	  $(call parameter,profiles,PROFILES) $(call parameter,evidence_seeds,EVIDENCE_SEEDS)

training-curves: $(READY)
	$(call takes,PROFILE VARIATIONS EXTRACTOR WEIGHTS SETTINGS RESULTS IMAGES $(COMMON))
	$(call papermill,nbs/tables/$(subst -,_,$@).ipynb,$(or $(RESULTS),results/runs/$@-$(NAME)-$(PROFILE)$(addprefix -,$(EXTRACTOR))$(addprefix -images,$(IMAGES)))) \
	  $(call parameter,seeds,SEEDS) $(call parameter,device,DEVICE) $(call parameter,extractor,EXTRACTOR) \
	  $(call parameter,weights,WEIGHTS) -p settings '$(or $(SETTINGS),$(if $(filter smoke,$(PROFILE)),{"epochs": 20},{}))' \
	  -p categories '$(CATEGORIES)' -p profile '$(PROFILE)' -p variations '$(VARIATIONS)' $(call parameter,images,IMAGES)

spread: $(READY)
	$(call takes,)
	$(call papermill,nbs/tables/spread.ipynb,results/runs/spread) -p quick False

robustness: $(READY)
	$(call takes,)
	ROBUSTNESS_KILLS=100 $(BIN)/python -m pytest -q tests/test_bad_input.py tests/test_wrong_types.py tests/test_inputs.py tests/test_reference.py \
	  tests/test_detector.py tests/test_engines.py tests/test_properties.py tests/test_robustness.py tests/test_report_page.py \
	  tests/test_inspection.py tests/test_watch.py tests/test_demo.py tests/test_baselines.py tests/test_threads.py

cluster-test: $(READY)
	$(call takes,)
	CLUSTER_RUNS=2000 $(BIN)/python -m pytest -q tests/test_cluster.py

report: $(READY)
	$(call takes,)
	$(BIN)/python -c 'from cse.lab.report_page import write_page; print(write_page("results/reference", "results/report/index.html"))'

$(VENV)/.docs: $(READY)
	$(BIN)/python -c 'import sphinx, myst_nb, furo, latex2mathml, ziamath' 2>/dev/null || $(BIN)/python -m pip install --quiet --editable '.[docs]'
	touch $@

docs: export CUDA_VISIBLE_DEVICES :=
docs: $(VENV)/.docs
	$(call takes,)
	$(BIN)/python docs/source.py docs/_build/source
	$(BIN)/sphinx-build -q -W --keep-going -j 2 -c docs docs/_build/source docs/_build/html
	SITE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 tests/test_site.py
	@echo docs/_build/html/index.html

prepare: $(READY)
	$(call takes,)
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python docs/readme.py

clean:
	rm -rf $(VENV) *.egg-info build dist docs/_build .pytest_cache
