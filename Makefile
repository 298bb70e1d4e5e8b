# Everything a user or CI calls. `make setup` is quick when nothing changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-s3 check bench bench-quantize bench-memory bench-store bench-large bench-client bench-gate bench-judges bench-plan gpu model clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[openvino,s3,sign,dev]'
	@touch $@

demo: setup  ## quantize, compile and load-test the shipped model; prints one table
	$(BIN)/llmopt run demo/pipeline.yaml

test: setup  ## all tests, judges included; benchmarks are left to `make bench`
	$(BIN)/python -m pytest -q -m "not bench and not peers and not judge"

test-s3: setup .venv-swift/.ready  ## what needs an S3 server, on Ceph and on OpenStack Swift (`make test` has rclone's)
	tests/servers/install.sh
	LLMOPT_TEST_S3=ceph,swift $(BIN)/python -m pytest -q -m "s3 and not bench"

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## the figures of README.md
	$(BIN)/python -m pytest -q -s -m bench tests/bench

# Other tools want other versions of torch and transformers than we do: each has an environment of its own.
PEERS := llmcompressor gptqmodel autoround
JUDGES := llmcompressor gptqmodel modelopt peft lm_eval deploy edgellm intoto

.venv-%/.ready: tests/bench/peers/%.txt
	@test -x .venv-$*/bin/python || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

# Its wheel is for Python 3.12, where PyPI's torch brings CUDA; the exporter in it is plain Python and runs on 3.11.
.venv-edgellm/.ready: tests/bench/peers/edgellm.txt
	@test -x .venv-edgellm/bin/python || $(PYTHON) -m venv .venv-edgellm
	.venv-edgellm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	.venv-edgellm/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
	  --python-version 3.12 --implementation cp --platform manylinux_2_35_x86_64 \
	  --target $$(.venv-edgellm/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') tensorrt-edgellm==0.11.0
	@touch $@

.venv-swift/.ready: tests/servers/swift.txt
	@test -x .venv-swift/bin/python || $(PYTHON) -m venv .venv-swift
	.venv-swift/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

bench-quantize: setup $(PEERS:%=.venv-%/.ready)  ## ours against other quantizers; LLMOPT_BENCH_FRESH=1 measures them again
	$(BIN)/python -m pytest -q -s -m peers tests/bench/test_against_peers.py

bench-client: setup .venv-guidellm/.ready .venv-aiperf/.ready  ## the load client beside the truth and other load testers
	$(BIN)/python -m pytest -q -s -m "bench or peers" tests/bench/test_client.py

bench-gate: setup  ## false alarms and power of the gate, simulated and on this machine
	$(BIN)/python -m pytest -q -s -m bench tests/bench/test_gate.py

bench-large: setup .venv-llmcompressor/.ready  ## the same on a model of 1B parameters (an hour of one core)
	$(BIN)/python -m pytest -q -s -m peers tests/bench/test_large.py

bench-plan: setup  ## what `llmopt plan` predicts for this CPU beside what bench measures
	$(BIN)/python -m pytest -q -s -m bench tests/bench/test_planner.py

gpu: setup  ## on a machine with an NVIDIA GPU and a CUDA build of torch: what we write, multiplied by the hardware
	$(BIN)/python -m pytest -q -s -m gpu tests/gpu

bench-memory: setup  ## 8 GB of weights under 4 GB of memory, and killed twenty times
	$(BIN)/python -m pytest -q -s -m bench tests/bench/test_memory.py

bench-store: setup .venv-boto3/.ready  ## the store beside cp, sha256, obstore and boto3, on Ceph; LLMOPT_BENCH_STORE_BYTES=50e6 for a look
	tests/servers/install.sh
	LLMOPT_TEST_S3=ceph $(BIN)/python -m pytest -q -s -m bench tests/bench/test_store.py

bench-judges: $(JUDGES:%=judge-%)  ## other tools load what we wrote

judge-%: .venv-%/.ready
	PYTHONPATH=. .venv-$*/bin/python -m pytest -q -m judge -W default $(wildcard tests/judges/test_$*.py tests/judges/test_$*_*.py)

model: setup  ## train the shipped model again (hours on a CPU; see demo/README.md)
	$(BIN)/python demo/train.py --out demo/model

clean:
	rm -rf $(VENV) .venv-* .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
