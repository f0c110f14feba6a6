# make demo: erase three styles from the bundled model, restore one, and show it.
# make check: format, lint, types and the fast tests. make test: all tests. make coverage: what the fast tests cover.
# Each sets up the virtual environment first, where it is missing or older than requirements.txt or pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := HF_HUB_OFFLINE=1 $(BIN)/python
DEMO := demo
WORKERS ?= 2
# One torch thread for each of xdist's workers. A file's tests stay together and in order: some of them need what those
# before them made.
TEST := OMP_NUM_THREADS=1 $(RUN) -m
XDIST := -n $(WORKERS) --dist loadfile
FAST := -m "not slow and not browser and not kill and not readme"

.PHONY: setup check test coverage demo bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(TEST) pytest $(FAST) $(XDIST)

test: setup  # the live page's test needs a browser, and is skipped without one
	command -v chromium || (timeout 300 apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 || true
	$(TEST) pytest $(XDIST)

coverage: setup
	$(BIN)/coverage erase
	$(TEST) coverage run -m pytest $(FAST) $(XDIST)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered

demo: setup
	$(RUN) eval-scripts/make-prompts.py --category style --protected --seeds_per_prompt 8 --save_path $(DEMO)/prompts.csv
	$(RUN) train-scripts/SRSME_Solution.py --erased_index 1,2,3 --em_indexes 1,2,3 --artifacts_dir $(DEMO)/shifts
	$(RUN) train-scripts/SRS_ME.py --erased_index 1,2,3 --artifacts_dir $(DEMO)/shifts
	$(RUN) eval-scripts/generate-images-merge.py --prompts_path $(DEMO)/prompts.csv --save_path $(DEMO)
	$(RUN) eval-scripts/generate-images-merge.py --shifts 1,2,3 --prompts_path $(DEMO)/prompts.csv --save_path $(DEMO) \
	  --artifacts_dir $(DEMO)/shifts
	$(RUN) eval-scripts/generate-images-merge.py --shifts 1,3 --prompts_path $(DEMO)/prompts.csv --save_path $(DEMO) \
	  --artifacts_dir $(DEMO)/shifts
	$(RUN) eval-scripts/image-grid.py --image_dirs $(DEMO)/ori-merge $(DEMO)/123-merge $(DEMO)/13-merge \
	  --column_titles 'original' 'all three erased' 'Picasso restored' --erased 1,3 --restored 2 \
	  --save_path $(DEMO)/demo.png

bench: setup
	$(RUN) tests/bench/bench.py
	$(RUN) tests/bench/commands.py
	$(RUN) tests/bench/many_gates.py

clean:
	rm -rf $(DEMO) htmlcov .coverage .coverage.*
