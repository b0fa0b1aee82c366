# make setup   the environment in .venv, everything pinned (skipped when it is up to date)
# make demo    the whole path on a small digital cohort, to a report
# make test    every test
# make browser a pinned headless Chromium for the tests, from the npm registry
# make lint    ruff and mypy
# make docs    the site, from docs/ into build/docs/
# make bench   the benchmarks, each against a named peer
# make bench-quality ANATOMY=FOLDER   how close to the truth, beside the classical methods
# make bench-box ANATOMY=FOLDER       the same of the model in the box as it is, in one process
# make bench-ablations ANATOMY=FOLDER  what each part is worth, into docs/ablations.md
# make bench-real DATA=FOLDER   a lake of real scans, harmonized: what is left of sites, and of people
# make box     the weights that come with the package, from label maps: make box ANATOMY=FOLDER

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
UV     := 0.13.9
EXTRAS := strip,dino,dev,docs
DEMO   ?= work/demo
ARGS   ?=
# Tests on Ray beside all others; LANES= runs them one after the other, as `pytest` does.
LANES  ?= -n 2 --dist loadscope --no-loadscope-reorder

CHROMIUM := 153.0.0
BROWSER  := .browser/chromium

.PHONY: setup demo test browser lint format docs bench bench-quality bench-box bench-ablations bench-real box clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt setup.py
	@$(PYTHON) -c 'import sys; ok = (3, 11) <= sys.version_info < (3, 13); \
	  sys.exit(0 if ok else "Python 3.11 or 3.12 is needed: make PYTHON=python3.11 setup")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if $(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV); then \
	  VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install -c constraints.txt -e '.[$(EXTRAS)]'; \
	else false; fi \
	|| $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	touch $(STAMP)

demo: setup
	$(BIN)/sgcd demo --out $(DEMO) $(ARGS)

test: setup browser
	$(BIN)/python -m pytest $(LANES) $(ARGS)

# Other machines than x86-64 Linux: a Chromium on the PATH, or its path in SGCD_CHROMIUM.
browser:
	@if [ -x $(BROWSER) ] || [ "$$(uname -sm)" != "Linux x86_64" ]; then exit 0; fi; \
	  npm install --silent --no-save --no-audit --no-fund --ignore-scripts --prefix .browser \
	    @sparticuz/chromium@$(CHROMIUM) && cd .browser && TMPDIR=$(CURDIR)/.browser node -e \
	    "import('@sparticuz/chromium').then(found => found.default.executablePath())" \
	  || echo "no browser for the tests of pages: npm and Node.js are needed (make browser)"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: setup
	$(BIN)/sphinx-build -W --keep-going -q -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

bench: setup
	@set -e; found=0; for file in benchmarks/bench_*.py; do \
	  test -e "$$file" || continue; found=1; echo "== $$file"; $(BIN)/python "$$file"; \
	done; test $$found = 1 || echo "no benchmark yet"

bench-quality: setup
	$(BIN)/python benchmarks/quality.py work/quality $(if $(ANATOMY),--anatomy $(ANATOMY)) $(ARGS)

bench-box: setup
	$(BIN)/python benchmarks/box_quality.py work/box-quality $(if $(ANATOMY),--anatomy $(ANATOMY)) $(ARGS)

bench-ablations: setup
	$(BIN)/python benchmarks/ablations.py work/ablations --out docs \
	  $(if $(ANATOMY),--anatomy $(ANATOMY)) $(ARGS)

bench-real: setup
	$(BIN)/python benchmarks/real_scans.py $(DATA) --out work/real $(ARGS)

box: setup
	$(BIN)/python -m pipelines.box work/box --anatomy $(ANATOMY) --preset small --steps 0 \
	  --filter-samples 1600 --set seed=31 --install $(ARGS)
	$(BIN)/python -m pipelines.box work/box --anatomy $(ANATOMY) --preset tiny --steps 600 \
	  --filter-samples 1500 --set seed=33 --set global_stage.learning_rate=5e-4 --install $(ARGS)

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
