# Two commands do it all: `make up` runs a cluster on this machine, `make test` runs the tests.

PYTHON   ?= python3
PORT     ?= 9876
REPLICAS ?= 3
DATA     ?= data

.PHONY: help up test test-container soak check bench lock clean

help:  ## List what there is
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile

up: .venv/installed  ## Run a local cluster: PORT=9876 REPLICAS=3 DATA=data
	@exec .venv/bin/mehdb local --replicas $(REPLICAS) --port $(PORT) --data-dir $(DATA)

test: .venv/installed  ## Run all tests: TESTS="-k name" for some
	.venv/bin/pytest -m "not soak and not container" $(TESTS)

# In namespaces of its own for processes and mounts: whatever it starts and mounts goes with it, however it ends. The shell
# is there to wait for processes that have lost their parents.
test-container: .venv/installed  ## Build the image, run it in containers (as root; podman, buildah, runc, debootstrap)
	unshare --mount --pid --fork --kill-child --mount-proc \
		sh -c '.venv/bin/pytest -m container tests/container --no-header -s $(TESTS); exit $$?'

soak: .venv/installed  ## Run the proofs that take minutes
	.venv/bin/pytest -m soak --no-header -q $(TESTS)

check: .venv/installed  ## Lint, format, types, layers
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: .venv/installed  ## Measure, as ratios against a reference in the same run (needs wrk)
	.venv/bin/python bench/run.py $(BENCH)

# One lock for the image, one for development with the same versions, one for the image's build.
LOCK = UV_CUSTOM_COMPILE_COMMAND="make lock" .venv/bin/uv pip compile --quiet --upgrade --universal \
	--python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links

lock: .venv/installed  ## Resolve the locked dependencies anew
	.venv/bin/pip install --quiet uv
	$(LOCK) pyproject.toml -o requirements.lock
	$(LOCK) -c requirements.lock --extra dev pyproject.toml -o requirements-dev.lock
	.venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"])' \
		| tr ' ' '\n' | $(LOCK) - -o requirements-build.lock

clean:  ## Remove what was made here; volumes in data/ stay
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis dist

.venv/installed: pyproject.toml requirements-dev.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "mehdb needs Python 3.11 or newer; name one with PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --require-hashes -r requirements-dev.lock
	.venv/bin/pip install --quiet --no-deps -e .
	@touch $@
