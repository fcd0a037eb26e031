# make demo   residual networks through the fused kernels, compared with eager PyTorch: a table and pictures
# make test   the whole suite
# make sanitize   the CPU kernels' tests, on a library built with AddressSanitizer and UndefinedBehaviorSanitizer
# make bench   networks, layers and stacks against eager PyTorch and torch.compile, on this machine
# make tune   the fastest forms and tiles of every layer on this GPU, written to fusedres/tiles/
# make dist   a wheel and an sdist in dist/, each installed and run in an environment of its own
# make docs   the pages of docs/, with the API from docstrings, in build/site
# They make .venv on first use; PYTHON chooses the interpreter, ARGS goes to the command.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
READY := .venv/ready

.PHONY: demo test sanitize lens bench tune dist docs check clean

demo: $(READY)
	$(BIN)/python -m fusedres demo $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -n 2 $(ARGS)

sanitize: $(READY)
	PYTHON=$(BIN)/python bash tests/sanitize.sh $(ARGS)

lens: $(READY)
	$(BIN)/python bench/lens.py $(ARGS)

bench: $(READY)
	$(BIN)/python -m pytest bench/ --benchmark $(ARGS)

tune: $(READY)
	$(BIN)/python bench/tune.py $(ARGS)

dist: $(READY)
	$(BIN)/python tests/distribution.py $(ARGS)

docs: $(READY)
	$(BIN)/python -m mkdocs build --strict $(ARGS)

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy fusedres

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 10), "fusedres needs Python 3.10, this is " + sys.version'
	$(PYTHON) -m venv .venv || { echo "python3 -m venv failed: on Debian and Ubuntu, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[demo,test]'
	@touch $@

clean:
	rm -rf .venv *.egg-info build dist
