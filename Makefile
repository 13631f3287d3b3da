# make setup   once, as root: Debian packages that are missing, and the virtualenv
# make demo    watch sessions move: two hosts and a DNS server on this machine (root)
# make test    all tests; those that need root or a tool skip and say so
# make check   ruff, mypy --strict
# make check-model   the handover's formal model (spin, gcc; some minutes)
# make bench   the gaps of a handover, beside reconnecting and MPTCP (root)
# make clean   what the above has made

BIN := .venv/bin

.PHONY: setup demo test check check-model bench clean

setup:
	@python=$$(PYTHON='$(PYTHON)' .ci/setup) && $(MAKE) -s PYTHON="$$python" .venv/.stamp
	@echo 'ready: make demo, make test, make check, make bench'

.venv/.stamp: pyproject.toml
	@echo 'making .venv with $(PYTHON)'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# The goals below do what setup does where it has not been done.
demo test check check-model bench: | $(if $(wildcard .venv/.stamp),,setup)

demo:
	@$(BIN)/python -m tests.demo

test:
	@$(BIN)/python -m pytest

check:
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict

check-model:
	@$(BIN)/python -m tests.model

bench:
	@$(BIN)/python -m tests.bench

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
