# `make` shows this list.
SHELL := /bin/bash
PROVISION := vagrant/provision.sh
VENV := .venv
PYTEST := $(VENV)/bin/python -m pytest

.PHONY: help images up down purge deps check test test-fast test-vm fuzz properties scale crash-rounds crash-test damage strangers bench failover completion

help: ## Show what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

up: ## Install what is missing and bring up a working one-node cluster (root; safe to run again)
	@$(PROVISION) up

down: ## Stop everything and remove every trace in the kernel; the data stays
	@$(PROVISION) down

purge: ## make down, and remove data, images and program
	@$(PROVISION) purge

deps: ## Install what the tests need
	@$(PROVISION) packages test
	@$(PROVISION) venv $(VENV) test,legacy

check: deps ## Lint, types, import directions, documents (part of make test)
	@$(PYTEST) -q tests/test_gate.py tests/test_documents.py

test-fast: deps ## The tests that need no root
	@$(PYTEST) -q -m "not needs_root and not e2e"

images: deps # into the cache that nodes and tests share, so that no test has to wait for mmdebstrap
	@HOSTD_STATE_DIR=$(CURDIR)/$(VENV)/state $(VENV)/bin/hostd image build

test: images ## All tests; installs what it needs; root for the kernel's part
	@$(PYTEST)

test-vm: images ## What has to do with the kernel again in a Debian machine with cgroup v2, systemd and a power cut (root, an hour; PART=isolation, kernel, jobs or story)
	@$(PROVISION) packages vm
	@$(VENV)/bin/python -m tests.vm $(if $(PART),--part $(PART))

fuzz: deps ## Search for inputs that must not be: make fuzz TARGET=layers SECONDS=600 (root; faster with atheris)
	@$(VENV)/bin/python -c 'import atheris' 2>/dev/null || $(VENV)/bin/pip install -q atheris==3.0.0 || true
	@$(VENV)/bin/python -m tests.fuzz $(or $(TARGET),layers) --seconds $(or $(SECONDS),600)

properties: deps ## Random commands to the store and to a plain model of it: make properties EXAMPLES=5000 SEED=1
	@$(VENV)/bin/python -m tests.discovery.test_state_model --examples $(or $(EXAMPLES),5000) --seed $(or $(SEED),1)

scale: deps ## Measure a store of 100,000 keys, 10,000 instances and 1,000 hosts: memory, rest, restart (some minutes)
	@$(VENV)/bin/python -m tests.discovery.scale

crash-rounds: images ## kill -9 of hostd and of the spawner at random moments: make crash-rounds ROUNDS=1000 SEED=1 (root)
	.venv/bin/python -m tests.hostd.rounds --rounds $(or $(ROUNDS),1000) --spawner $(or $(SPAWNER),200) --both $(or $(BOTH),50) --seed $(or $(SEED),1)

failover: deps ## How long nothing can be written after the leader's kill -9: make failover RUNS=50
	@$(VENV)/bin/python -m tests.discovery.failover --runs $(or $(RUNS),50)

crash-test: deps ## Three members of discovery under kills, power cuts and lost packets, every history checked: make crash-test ROUNDS=500 SEED=1 (root, 45 minutes; CORE=shipped: pysyncobj as it comes)
	@$(VENV)/bin/python -m tests.discovery.crash --rounds $(or $(ROUNDS),500) --seed $(or $(SEED),1) --core $(or $(CORE),ours)

damage: deps ## A member of discovery on torn, flipped, missing files and on disks that refuse: make damage FLIPS=1000 SEED=1 (45 minutes)
	@$(VENV)/bin/python -m tests.discovery.crash.damage --flips $(or $(FLIPS),1000) --seed $(or $(SEED),1)

strangers: deps ## Strangers of every kind at a member's port, looked at all the time: make strangers SECONDS=600 KINDS=noise (root)
	@$(VENV)/bin/python -m tests.discovery.crash.strangers --seconds $(or $(SECONDS),120) --idle 2000 $(if $(KINDS),--kinds $(KINDS))

bench: deps ## Measure beside peers; prints a table, writes bench/results.json (root)
	@bench/run
