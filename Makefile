# make build  the variants that this machine can run, into build/: what the others begin with
# make demo   the kernel in the vision towers of Gemma 4 and Qwen3-VL, on real photos (ARGS="--plot demo.png photo.jpg")
# make quick  formatting, and the tests that catch most, in a minute; incremental
# make test   what is tested of the kernel and its package (ARGS="-k gradcheck"; "-n0" for one process)
# make check  all that is tested, with what only maintainers need: see the end of `make test`
# make simt   the GPUs' sources for the engine that runs them on a CPU (tests/simt)
# make bench  the kernel against its peers, interleaved (ARGS="--batch 1 --dtype fp32 bf16 --json out.json")
# make call   what a call costs the host
# make step   what share of a vision forward and of a LoRA step the lookup is
# make measure  all that the pages show, by these three, into benchmarks/results
# make gate   whether it has become slower than the committed baseline; needs valgrind
# make report the README's tables and plots, from the committed results (ARGS=--check)
# make cuda   the CUDA variant for all architectures, with a compiler from PyPI; needs no GPU
# make macos-headers  PyTorch's headers for macOS, which a test checks the Metal launcher against
# make asan   the tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make lint   formatting and static checks
# make format apply the formatting
# make clean  remove everything that the above made

.PHONY: demo quick test check simt bench call step measure gate report cuda macos-headers asan lint format clean build

.DEFAULT_GOAL := build

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
TESTS := $(VENV)/installed-tests
TOOLKIT := .build/cuda-toolkit
# A process a core. Two threads in each: one would leave code untested, and with more they wait for each other.
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(RUN) -m pytest -n logical --maxprocesses 8 --dist loadgroup
CXX_SOURCES := $(wildcard csrc/*.h csrc/*/* torch-ext/*.h torch-ext/*.cpp tests/simt/*.h tests/simt/*.cpp tests/simt/cuda/* tests/simt/tiny/* $(addprefix tests/simt/metal/, *.h */*.h *.mm metal_stdlib))

demo: build
	$(RUN) examples/photos.py $(ARGS)

quick: build lint
	$(PYTEST) -m kernels_ci $(ARGS)

test: build $(TESTS)
	$(PYTEST) -m "not check" $(ARGS)

check: build simt
	$(MAKE) cuda macos-headers ARGS=
	$(PYTEST) $(ARGS)

simt: $(TESTS)
	$(RUN) tests/simt/build.py

bench: build $(TESTS)
	$(RUN) benchmarks/compare.py $(ARGS)

call: build $(TESTS)
	$(RUN) benchmarks/call.py $(ARGS)

step: build $(TESTS)
	$(RUN) benchmarks/step.py $(ARGS)

measure: build $(TESTS)
	$(RUN) benchmarks/compare.py --list cpu --json benchmarks/results/cpu.json
	$(RUN) benchmarks/compare.py --list scaling --json benchmarks/results/scaling.json
	$(RUN) benchmarks/call.py --json benchmarks/results/call.json
	$(RUN) benchmarks/step.py --json benchmarks/results/step.json

gate: build $(TESTS)
	$(RUN) benchmarks/regression.py $(ARGS)

report: $(TESTS)
	$(RUN) benchmarks/report.py $(ARGS)

cuda: $(VENV)/installed $(TOOLKIT)/installed
	$(RUN) tools/build.py --backend cuda $(ARGS)

macos-headers: $(VENV)/installed
	$(RUN) tests/simt/metal/fetch_headers.py

# Python itself isn't instrumented, so the runtimes go in first, and leaks can't be told from Python's
# own; tests of running out of memory get their null. Not captured (-s): a report ends the process. torch.compile would only build more code.
asan: $(TESTS)
	$(RUN) tools/build.py --sanitize --output .build/asan
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	LOCAL_KERNELS=kernels-community/fused-embedding-lookup=$(CURDIR)/.build/asan \
	$(PYTEST) -s -p no:cacheprovider -m asan -k "not compile and not simt" $(ARGS)

lint: $(TESTS)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(TESTS)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

build: $(VENV)/installed
	$(RUN) tools/build.py

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	touch $@

$(TESTS): requirements-test.txt $(VENV)/installed
	@echo "installing what the tests and benchmarks add into $(VENV) ..."
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# Apart from the environment: nothing there needs it, and torch would take notice of triton.
$(TOOLKIT)/installed: requirements-cuda.txt | $(VENV)/installed
	$(RUN) -m pip install --disable-pip-version-check --no-deps --upgrade --target $(TOOLKIT) -r requirements-cuda.txt
	touch $@

clean:
	rm -rf $(VENV) .build build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
