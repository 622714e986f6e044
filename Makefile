# Every target works as the very first command on a fresh machine: it installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROTOS := $(wildcard protos/eldric/v1/*.proto)

.PHONY: setup programs extras demo test check fmt bench protos clean

setup: $(READY)

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m eldric.engine.kernels
	touch $@

# Programs of some tests that pip does not have: an NFS server, FUSE's library, Vulkan on the CPU. Without them those
# tests are skipped.
PROGRAMS := nfs-ganesha nfs-ganesha-vfs fuse3 iproute2 libvulkan1 mesa-vulkan-drivers
programs:
	command -v ganesha.nfsd && command -v fusermount3 && command -v ss && ls /usr/share/vulkan/icd.d/lvp_icd.* || { \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends $(PROGRAMS); }

# Optional packages that some tests use; without them those tests are skipped.
extras: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev,ucx]'

demo: $(READY)
	$(BIN)/python -m eldric.cli.demo

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/check_stubs.py
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/unit/test_house.py

fmt: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.stage_latency $(ARGS)

protos: $(READY)
	$(BIN)/python protos/generate.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
