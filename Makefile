# make demo   the simulated robot, the policy node, an instruction, motion (demo_out/)
# make test   lint, types and tests: what CI runs
# make bench-gpu      a chunk of the full-size network on this machine's GPU: table and parity gates
# make small-policy   trains the small policy that the package ships
# make lock           newest versions into requirements/, for PYTHON
# All work in a fresh clone with nothing set up; they keep everything in .venv.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
# The CPU build serves the demo and the tests. From PyPI, torch for Linux brings gigabytes of CUDA
# packages: give TORCH_INDEX=<PyTorch's index of CPU builds> where pip does not find one by itself.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
INSTRUCTION ?=
DEMO_ARGS ?=
# make test PYTEST_ARGS='-m "not slow"'
PYTEST_ARGS ?=
# The versions that each Python gets, so that a new release at the registry changes no result.
SERIES := $(shell $(or $(wildcard $(VENV)/bin/python),$(PYTHON)) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
LOCKED := $(wildcard requirements/constraints-$(SERIES).txt)
# without setuptools' general advice on editable installs
INSTALL := PYTHONWARNINGS=ignore $(PIP) install --quiet \
	$(if $(LOCKED),--constraint $(LOCKED) --build-constraint $(LOCKED)) --editable
# busy-waiting OpenMP threads stall each other and the simulator on two cores
export OMP_WAIT_POLICY ?= passive

PACKAGED := setup.py pyproject.toml CMakeLists.txt package.xml $(wildcard msg/* config/* launch/* scripts/* cmake/*)

.PHONY: demo test lint install lock clean system small-policy bench-gpu
.DEFAULT_GOAL := install

demo: $(VENV)/demo.stamp
	$(VENV)/bin/pi05 demo $(if $(INSTRUCTION),--instruction "$(INSTRUCTION)") $(DEMO_ARGS)

test: $(VENV)/dev.stamp lint
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/dev.stamp
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

install: $(VENV)/demo.stamp

system:
	@sh scripts/system_packages.sh

# The pip that Python 3.10 ships takes many minutes to choose versions. torch is installed without
# constraints: what it needs differs by index.
$(VENV)/torch.stamp: scripts/check_python.py
	$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv $(VENV)
	$(if $(LOCKED),,@echo "no requirements/constraints-$(SERIES).txt: pip chooses the versions")
	$(PIP) install --quiet --upgrade $(if $(LOCKED),--constraint $(LOCKED)) pip
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp $(PACKAGED) $(LOCKED) | system
	$(INSTALL) '.[sim,eval]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(PACKAGED) $(LOCKED) | system
	$(INSTALL) '.[sim,eval,train,dev]'
	@touch $@ $(VENV)/demo.stamp

# One file for each Python: make lock PYTHON=python3.12
lock:
	$(PYTHON) scripts/check_python.py
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/pip --disable-pip-version-check install --quiet --upgrade pip packaging tomli
	build/lock/bin/python scripts/lock.py "$(TORCH)"

# Needs torch's CUDA build, which PyPI has. fp8 wants a GPU of compute capability 8.9.
bench-gpu: $(VENV)/demo.stamp
	$(VENV)/bin/pi05 bench latency --checkpoint full --device cuda --output bench_gpu

# The shipped policy once more, from nothing: 1 h 45 min on two cores, and 2 GB in data/ and runs/.
small-policy: $(VENV)/dev.stamp
	$(VENV)/bin/pi05 record --states --episodes 12000 --seed 1 \
		--tasks touch=3,pick=3,place=4,wave=2,home=1 --output data/states
	$(VENV)/bin/pi05 train examples/small_policy/train_small.yaml
	$(VENV)/bin/pi05 dagger runs/small_aloha/checkpoint --episodes 320 --seed 2 \
		--tasks touch=1,pick=5,place=4 --output data/on_policy
	$(VENV)/bin/pi05 train examples/small_policy/train_small_dagger.yaml

clean:
	rm -rf $(VENV) build demo_out pi05_ros/msg pi05_ros/*.so *.egg-info
