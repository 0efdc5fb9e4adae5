# `make demo` and `make test` each set up what they need in .venv and are quick the second time.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
pip := $(bin)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

native := CMakeLists.txt setup.py $(wildcard csrc/*)
formatted := $(wildcard csrc/*.cpp csrc/*.h csrc/*.cu csrc/*.cuh tests/emulated_cuda/*.h benchmarks/*.cpp)

.PHONY: demo test fuzz lint format types docs bench sanitize emulate interpret gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/demo
	$(bin)/gradsurgery unlearn digits

# the whole suite runs on every core, a process and some 1 GB each; where ARGS picks tests there is
# one process, which starts sooner, unless WORKERS says otherwise
WORKERS ?= $(if $(filter tests% -k% -m% --lf,$(ARGS)),0,logical)
workers = -n $(WORKERS) --maxprocesses=8 --dist=worksteal

test: $(VENV)/dev
	$(bin)/python -m pytest $(workers) $(ARGS)

# inputs drawn anew for each seed from FIRST on, EFFORT times as many as in `make test`: some 20 minutes a seed on
# one core. What fails is kept in build/fuzz/examples, and tried first the next time
FIRST ?= 0
SEEDS ?= 1
EFFORT ?= 20
fuzz: $(VENV)/dev
	$(bin)/python -m tests.fuzz $(FIRST) $(SEEDS) $(EFFORT) $(ARGS)

lint: $(VENV)/dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/clang-format --dry-run -Werror $(formatted)

format: $(VENV)/dev
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(formatted)

types: $(VENV)/dev
	$(bin)/pyright --pythonpath $(bin)/python

# into build/site, with Python 3.11 or newer; what Material says of the years to come is read where
# its version is raised. Without -q, with which MkDocs counts no warnings
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict $(ARGS)

# once with memory that the allocator keeps, once with fresh pages for every large result
results := benchmarks/results/cpu
bench: $(VENV)/bench
	mkdir -p $(results)
	MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=17179869184 \
	    $(bin)/python -m pytest benchmarks -q --benchmark-disable-gc \
	    --benchmark-json=$(results)/reused.json $(ARGS)
	$(bin)/python -m pytest benchmarks -q --benchmark-disable-gc \
	    --benchmark-json=$(results)/fresh.json $(ARGS)
	$(bin)/python benchmarks/report.py $(results)/reused.json $(results)/fresh.json | tee $(results)/table.md

# a copy of the package beside its own build of the module: the ordinary build stays as it is.
# libstdc++ is preloaded with libasan, which must find the C++ runtime when it starts. -O1 compiles in
# half the time of -O2, and fewer of the accesses that a sanitizer checks are optimized away; what it
# leaves out besides are fused multiplications, whose accuracy tests of the kernels ask for
sanitize: $(VENV)/dev
	mkdir -p build/sanitize
	rm -rf build/sanitize/tree && mkdir build/sanitize/tree
	cp -r gradsurgery tests pyproject.toml build/sanitize/tree
	rm -f build/sanitize/tree/gradsurgery/_C*.so
	$(bin)/cmake -S . -B build/sanitize/cmake -GNinja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -fexpensive-optimizations -DNDEBUG" \
	    -DGRADSURGERY_SANITIZE=ON -DGRADSURGERY_CUDA=OFF \
	    -DPython_EXECUTABLE=$(abspath $(bin)/python) \
	    -Dpybind11_DIR=`$(bin)/python -m pybind11 --cmakedir` \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath build/sanitize/tree/gradsurgery)
	$(bin)/cmake --build build/sanitize/cmake
	cd build/sanitize/tree && ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    LD_PRELOAD="`$(CXX) -print-file-name=libasan.so` `$(CXX) -print-file-name=libstdc++.so`" \
	    $(abspath $(bin)/python) -m pytest $(workers) -p no:cacheprovider \
	    -m 'not plain_torch' tests/ops $(ARGS)

# the CUDA kernels compiled as C++ and run on the host, with bounds checked. A fiber's stack is no
# thread's: the sanitizer is told not to look for uses after a return on it
emulate: $(VENV)/dev
	mkdir -p build/emulate
	rm -rf build/emulate/tree && mkdir build/emulate/tree
	cp -r gradsurgery tests pyproject.toml build/emulate/tree
	rm -f build/emulate/tree/gradsurgery/_C*.so
	$(bin)/cmake -S . -B build/emulate/cmake -GNinja -DCMAKE_MAKE_PROGRAM=$(abspath $(bin)/ninja) \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DGRADSURGERY_SANITIZE=ON -DGRADSURGERY_EMULATE_CUDA=ON \
	    -DPython_EXECUTABLE=$(abspath $(bin)/python) \
	    -Dpybind11_DIR=`$(bin)/python -m pybind11 --cmakedir` \
	    -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath build/emulate/tree/gradsurgery)
	$(bin)/cmake --build build/emulate/cmake
	cd build/emulate/tree && ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
	    LD_PRELOAD="`$(CXX) -print-file-name=libasan.so` `$(CXX) -print-file-name=libstdc++.so`" \
	    $(abspath $(bin)/python) -m pytest $(workers) -p no:cacheprovider \
	    tests/test_cuda_kernels.py $(ARGS)

# Triton's kernels, statement by statement on the CPU; `make test` compiles them for GPUs
interpret: $(VENV)/dev
	TRITON_INTERPRET=1 $(bin)/python -m pytest $(workers) -p no:cacheprovider tests/kernels $(ARGS)

# on a machine with a GPU, with the packages that its Python has: nothing is installed
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m gradsurgery doctor
	$(PYTHON) -m pytest -q -p no:cacheprovider tests/kernels tests/test_cuda_kernels.py
	$(PYTHON) -m pytest -q -p no:cacheprovider tests/surgery/test_rules.py -k waits_for_no_gpu
	if command -v compute-sanitizer; then for tool in memcheck racecheck; do \
	    compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest -q -p no:cacheprovider \
	        tests/test_cuda_kernels.py -k 'matches_float64 and float32' || exit 1; done; fi
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf build dist *.egg-info gradsurgery/_C*.so $(VENV)/native

$(bin)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
	    { echo "gradsurgery needs Python 3.10 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }
	@command -v $(CXX) >/dev/null || \
	    { echo "gradsurgery needs a C++20 compiler, and $(CXX) is not one: install g++ or set CXX" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	    { rm -rf $(VENV); echo "gradsurgery needs Python's venv module (Debian: python3-venv)" >&2; exit 1; }

$(VENV)/tools: constraints.txt | $(bin)/python
	$(pip) setuptools pybind11 cmake ninja
	@touch $@

$(VENV)/native: pyproject.toml constraints.txt $(native) $(VENV)/tools
	@echo "building gradsurgery (the first time, torch is installed too)"
	PATH="$(abspath $(bin)):$$PATH" $(pip) --no-build-isolation -e .
	@touch $@

# the package is installed: only what an extra adds is fetched
$(VENV)/demo: pyproject.toml constraints.txt | $(VENV)/native
	$(pip) 'gradsurgery[cli,jobs]'
	@touch $@

$(VENV)/dev: $(VENV)/demo
	$(pip) 'gradsurgery[dev,bench,hf,images,language,speech]'
	@touch $@

$(VENV)/docs: pyproject.toml constraints.txt | $(VENV)/native
	$(pip) 'gradsurgery[docs]'
	@touch $@

$(VENV)/bench: $(VENV)/dev
	$(pip) 'gradsurgery[bench]'
	@touch $@
