# make demo   every suite on the embedded models and pictures, ending in a report
# make test   the tests; no network, no GPU
# make survival   killed, failed and fed broken files at full size, with the dashboard; TIMES=10: overnight
# make nightly   the same on real file systems, through power cuts, with other programs and versions; as root, hours
# make perf   time and memory against peer libraries, as ratios, written to reports/perf/; half an hour on quiet cores
# make clean  remove build outputs and caches; .venv and results stay
# A CPU-only torch that is already in .venv is kept. Another Python: make setup PYTHON=python3.12

PYTHON ?= python3
TIMES ?= 1
STAMP := .venv/.stamp

.PHONY: demo test survival nightly perf setup clean

demo: setup
	@.venv/bin/bench demo
	@.venv/bin/bench fit reports/scaling/isoflop-mini.csv

test: setup
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2

survival: setup
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 -m '' --full-size --times $(TIMES) tests/survival

nightly: setup
	@OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m nightly --full-size --times $(TIMES) tests/nightly

perf: setup
	@OMP_NUM_THREADS=1 .venv/bin/python tests/perf

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@echo "installing into .venv; the first time several GB (torch), minutes"
	@$(PYTHON) -m venv .venv
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,ray]"
	@touch $(STAMP)

clean:
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	@find bench suites tests -name __pycache__ -type d -prune -exec rm -rf {} +
