# make demo: erase three styles from the embedded model, give one back, and show it. make test: the tests.
# Both set up their own virtual environment first.
PYTHON ?= python3
VENV := .venv
RUN := HF_HUB_OFFLINE=1 $(VENV)/bin/python
DEMO := demo

.PHONY: setup demo test bench clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet -r requirements.txt
	touch $@

demo: setup
	$(RUN) eval-scripts/make-prompts.py --erase_cat style --protected --num_seeds 8 --save_path $(DEMO)/prompts.csv
	$(RUN) train-scripts/SRSME_Solution.py --erased_index 1,2,3 --em_indexes 1,2,3 --shifts_path $(DEMO)/shifts
	$(RUN) train-scripts/SRS_ME.py --erased_index 1,2,3 --shifts_path $(DEMO)/shifts
	$(RUN) eval-scripts/generate-images-merge.py --prompts_path $(DEMO)/prompts.csv --save_path $(DEMO)
	$(RUN) eval-scripts/generate-images-merge.py --merge 1,2,3 --prompts_path $(DEMO)/prompts.csv --save_path $(DEMO) --shifts_path $(DEMO)/shifts
	$(RUN) eval-scripts/generate-images-merge.py --merge 1,3 --prompts_path $(DEMO)/prompts.csv --save_path $(DEMO) --shifts_path $(DEMO)/shifts
	$(RUN) eval-scripts/sheet.py --paths $(DEMO)/ori-merge $(DEMO)/123-merge $(DEMO)/13-merge \
	  --titles 'original' 'all three erased' 'Picasso restored' --erased 1,3 --restored 2 --save_path $(DEMO)/demo.png

test: setup  # the page's test needs a browser, and is skipped without one
	command -v chromium || (timeout 300 apt-get install -y --no-install-recommends chromium) >/dev/null 2>&1 || true
	$(RUN) -m pytest

bench: setup
	$(RUN) tests/bench/bench.py

clean:
	rm -rf $(DEMO)
