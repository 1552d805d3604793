# Everything that a person runs; `make help` lists it. Each target does the set-up that it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --disable-pip-version-check
LOGGED := > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
WITH_SWIFT := tests/stores tests/faults tests/operations tests/cli
SOURCES := pyproject.toml setup.py island_fast/_diff.pyx island_fast/_l2.pxi

.PHONY: demo help ready test long quick check ceph cinderlib attached fuzz machine mutants versions bench kernels pause wheels docs pages clean

demo: $(VENV)/.installed  ## take and restore snapshots of a real volume, and show what each cost: a minute
	@scripts/install_packages qemu mkfs
	@$(BIN)/python scripts/demo.py

help:  ## list these targets
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

ready: $(VENV)/.tested  ## install everything that the tests need
	@scripts/install_packages qemu daemon vm mkfs fuse rabbit systemd udev fio peers libvirt
	@scripts/install_packages guest || echo 'skipping the tests of frozen guests'

test: ready  ## run all tests but the long ones, with a real qemu and a real Swift: under 20 minutes; TESTS="tests/live -n 1" chooses
	$(BIN)/pytest -n 3 --no-loadscope-reorder $(TESTS)

long: ready  ## run the tests that take minutes: kills at every call of the store, random lives, many calls at once; five minutes
	$(BIN)/pytest -n 3 --no-loadscope-reorder --long -m long $(TESTS)

quick: $(VENV)/.tested  ## run the unit and property tests and the rules of the code: seconds
	$(BIN)/pytest -q tests/unit tests/property tests/test_source.py

check: $(VENV)/.tested  ## check only the rules of the code: linting, types, imports between rooms
	$(BIN)/pytest -q tests/test_source.py

ceph: $(VENV)/.tested  ## run the tests of Swift with a real Ceph gateway: ten minutes; SUITE=trixie or sid takes the Ceph of that
	@scripts/install_packages qemu $(if $(SUITE),debootstrap,ceph)
	@$(if $(SUITE),$(PYTHON) -m scripts.ceph_suite $(SUITE) >/dev/null)
	CEPH_ROOT=$(if $(SUITE),$(CURDIR)/build/ceph/$(SUITE)) $(BIN)/pytest --ceph $(or $(TESTS),$(WITH_SWIFT))

cinderlib: $(VENV)/.tested  ## run cinderlib's own functional suite on the Cinder driver, as root: two minutes
	@scripts/install_packages qemu daemon fuse
	@$(BIN)/python scripts/cinderlib_suite.py

attached: $(VENV)/.tested  ## run the tests of VDUSE and NBD devices in virtual machines: half an hour; ROUNDS=60 is of kills while a user writes
	@scripts/install_packages qemu daemon vm mkfs fuse udev guest vduse
	$(BIN)/pytest --attached $(if $(ROUNDS),--rounds $(ROUNDS)) $(or $(TESTS),tests/live/test_vduse.py tests/live/test_nbd.py)

fuzz: $(VENV)/.tested  ## feed malformed images to the reader, for FUZZ_SECONDS (600)
	$(BIN)/python scripts/fuzz.py $(or $(FUZZ_SECONDS),600)

machine: $(VENV)/.tested  ## run random histories with crashes and faults, for MACHINE_SECONDS (3600), or one MACHINE_SEED again
	$(BIN)/python scripts/random_lives.py $(if $(MACHINE_SEED),--seed $(MACHINE_SEED),$(or $(MACHINE_SECONDS),3600))

mutants: $(VENV)/.tested  ## plant mistakes one at a time, and check that random histories find each: half an hour
	$(BIN)/python scripts/mutants.py

versions:  ## run demo and test on another Debian, in a chroot: SUITE=trixie or sid; TESTS="tests/unit" chooses; WITH="cinder==26.*" replaces
	@scripts/install_packages debootstrap
	@$(PYTHON) scripts/versions.py $(SUITE) $(if $(TARGET),--target $(TARGET)) $(if $(WITH),--with '$(WITH)') $(TESTS)

bench: $(VENV)/.tested  ## compare speed with restic, Borg, Cinder and qemu: half an hour; BENCH="--quick": minutes
	@scripts/install_packages qemu daemon fuse fio peers
	@$(BIN)/python -m scripts.peers || echo 'measuring the versions that are installed'
	@$(BIN)/python -m island_fast.bench $(BENCH)

kernels: $(VENV)/.tested  ## run the benchmarks of kernels and formats
	$(BIN)/pytest benchmarks --benchmark-enable --benchmark-only

pause: $(VENV)/.installed  ## measure how long guests wait for snapshots: ten minutes; PAUSE="--help" lists options
	@scripts/install_packages qemu daemon
	@$(BIN)/python scripts/pause.py $(PAUSE)

wheels: $(VENV)/.wheels  ## build and test an sdist and manylinux wheels in dist/; PYTHONS="python3.12 python3.13" chooses which
	@scripts/install_packages qemu daemon
	@$(BIN)/python scripts/wheels.py $(PYTHONS)

docs: $(VENV)/.documented  ## build the web site in build/docs; a broken link is an error
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/docs
	@echo 'open build/docs/index.html'

pages: $(VENV)/.installed  ## make the man pages, docs/commands.md, configuration.md and reference.md again, from help texts, keys and docstrings
	$(BIN)/python -m scripts.pages

clean:  ## remove everything that was built
	rm -rf $(VENV) build dist *.egg-info island_fast/_diff.c island_fast/_diff*.so

$(VENV)/bin/python:
	@scripts/install_packages compiler headers xxhash
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	@echo 'building island and installing what it needs in $(VENV)'
	@$(INSTALL) -e . $(LOGGED)
	@touch $@

$(VENV)/.documented: $(VENV)/bin/python pyproject.toml
	@echo 'installing what the site needs in $(VENV)'
	@$(INSTALL) -e '.[docs]' $(LOGGED)
	@touch $@

$(VENV)/.tested: $(VENV)/bin/python $(SOURCES)
	@scripts/install_packages libvirt-headers
	@echo 'building island and installing what its tests need in $(VENV)'
	@$(INSTALL) -e '.[test]' $(LOGGED)
	@touch $@ $(VENV)/.installed

$(VENV)/.wheels: $(VENV)/bin/python $(SOURCES)
	@echo 'installing what building wheels needs in $(VENV)'
	@$(INSTALL) -e '.[wheels]' $(LOGGED)
	@touch $@
