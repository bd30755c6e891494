# The README's commands. Each makes .venv first if it is missing or its requirements changed.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: demo study test test-slurm slow lint install clean

demo: $(INSTALLED)
	$(BIN)/python -m launch.demo --workdir=runs/demo

study: $(INSTALLED)
	$(BIN)/python -m launch.study

test: $(INSTALLED)
	$(BIN)/python -m pytest -n auto --dist=loadscope --no-loadscope-reorder \
		-m "not slow and not slurm" --durations=20

test-slurm: $(INSTALLED)
	@which slurmctld slurmd sbatch munged >/dev/null || \
		{ apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install --yes \
		--no-install-recommends slurmctld slurmd slurm-client munge; } || \
		{ echo "error: Slurm cannot be installed here; expected root on a Debian-like machine"; exit 2; }
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[slurm]'
	$(BIN)/python -m pytest -m slurm --durations=20

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name another: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import ensurepip' || \
		{ echo "error: $(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv"; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,pretrained,dev]'
	touch $(INSTALLED)

clean:
	rm -rf .venv build dist *.egg-info
