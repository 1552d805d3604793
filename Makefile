# Everything a person runs. Each target does the set-up that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --disable-pip-version-check
LOGGED := > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
SOURCES := pyproject.toml setup.py island_fast/_diff.pyx island_fast/_l2.pxi

.PHONY: demo test quick check fuzz machine mutants bench kernels pause wheels docs pages clean

demo: $(VENV)/.installed  ## the whole point of the project, on a real volume, in a minute
	@scripts/install_packages qemu mkfs
	@$(BIN)/python scripts/demo.py

test: $(VENV)/.tested  ## all tests, linting, types and layers; a real qemu and a real Swift included
	@scripts/install_packages qemu daemon vm mkfs fuse rabbit systemd fio peers libvirt
	@scripts/install_packages guest || echo 'the tests of NBD devices and of frozen guests are left out'
	$(BIN)/pytest -n 2 --no-loadscope-reorder

quick: $(VENV)/.tested  ## the tests that need neither Swift nor minutes
	$(BIN)/pytest -q tests/unit tests/property tests/test_source.py

check: $(VENV)/.tested  ## linting, types, layers and sizes alone
	$(BIN)/pytest -q tests/test_source.py

fuzz: $(VENV)/.tested  ## malformed images against the reader, for FUZZ_SECONDS (600)
	$(BIN)/python scripts/fuzz.py $(or $(FUZZ_SECONDS),600)

machine: $(VENV)/.tested  ## random lives of a repository under attack, for MACHINE_SECONDS (3600), or of one MACHINE_SEED
	$(BIN)/python scripts/random_lives.py $(if $(MACHINE_SEED),--seed $(MACHINE_SEED),$(or $(MACHINE_SECONDS),3600))

mutants: $(VENV)/.tested  ## whether those lives find each of the mistakes that scripts/mutants.py plants
	$(BIN)/python scripts/mutants.py

bench: $(VENV)/.tested  ## island against what people would use instead, a quarter of an hour; BENCH="--quick", or any of its options
	@scripts/install_packages qemu daemon fuse fio peers
	@$(BIN)/python -m island_fast.bench $(BENCH)

kernels: $(VENV)/.tested  ## the kernels' and formats' benchmarks
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-only

pause: $(VENV)/.installed  ## how long guests wait for snapshots, by volume and cluster size, ten minutes; PAUSE="--help"
	@scripts/install_packages qemu daemon
	@$(BIN)/python scripts/pause.py $(PAUSE)

wheels: $(VENV)/.wheels  ## an sdist and a manylinux wheel in dist/, tested without a compiler; PYTHONS="python3.12 python3.13"
	@scripts/install_packages qemu daemon
	@$(BIN)/python scripts/wheels.py $(PYTHONS)

docs: $(VENV)/.documented  ## the site, in build/docs; a broken link or anchor fails it
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo 'open build/docs/index.html'

pages: $(VENV)/.installed  ## man pages, docs/commands.md and docs/reference.md, from help texts and docstrings
	$(BIN)/python -m scripts.pages

clean:  ## remove what was built
	rm -rf $(VENV) build dist *.egg-info island_fast/_diff.c island_fast/_diff*.so

$(VENV)/bin/python:
	@scripts/install_packages compiler headers xxhash
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	@echo 'building island and fetching what it needs, into $(VENV)'
	@$(INSTALL) -e . $(LOGGED)
	@touch $@

$(VENV)/.documented: $(VENV)/bin/python pyproject.toml
	@echo 'fetching what the site needs, into $(VENV)'
	@$(INSTALL) -e '.[docs]' $(LOGGED)
	@touch $@

$(VENV)/.tested: $(VENV)/bin/python $(SOURCES)
	@scripts/install_packages libvirt-headers
	@echo 'building island and fetching what its tests need, into $(VENV)'
	@$(INSTALL) -e '.[test]' $(LOGGED)
	@touch $@ $(VENV)/.installed

$(VENV)/.wheels: $(VENV)/bin/python $(SOURCES)
	@echo 'fetching what building wheels needs, into $(VENV)'
	@$(INSTALL) -e '.[wheels]' $(LOGGED)
	@touch $@
