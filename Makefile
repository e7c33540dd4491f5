# make demo | train | nanogpt | test | sanitize | coverage | soak | lint | format | bench | gpu-check | clean      (PYTHON=, VENV=, TORCH=, ARGS= may be set)
# Each target does the set-up that it needs, on a bare clone too; what has not changed is not done again.
PYTHON ?= python3
VENV ?= .venv
export PYTHON VENV TORCH
ifndef TORCH
unexport TORCH
endif
SETUP = PY=$$(sh scripts/setup.sh) && export PATH="$$(dirname "$$PY"):$$PATH"
SETUP_DEV = PY=$$(sh scripts/setup.sh dev) && export PATH="$$(dirname "$$PY"):$$PATH"
CXX_FILES = find csrc bench tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'

.PHONY: demo train nanogpt test ctest pytest sanitize coverage soak lint format bench gpu-check setup clean

setup:
	@$(SETUP) && echo "$$PY"

demo:
	@$(SETUP) && exec "$$PY" examples/demo.py $(ARGS)

train:
	@PY=$$(sh scripts/setup.sh bench) && exec "$$PY" examples/train.py $(ARGS)

nanogpt:
	@PY=$$(sh scripts/setup.sh bench) && exec "$$PY" examples/nanogpt.py $(ARGS)

test: ctest
	@$(MAKE) --no-print-directory pytest

pytest:
	@$(SETUP) && exec "$$PY" -m pytest $(ARGS)

# -O2 without NDEBUG: assertions are on in the C++ tests
ctest:
	@$(SETUP) && cmake --log-level=WARNING -S . -B build/csrc -G Ninja -DTPN_MODULE=OFF -DTPN_TESTS=ON \
	  -DCMAKE_CXX_FLAGS_RELEASE=-O2 -DPython_EXECUTABLE="$$PY" && \
	cmake --build build/csrc && ctest --test-dir build/csrc --output-on-failure

# ASan with UBSan, then TSan for the tests that say that their ranks are threads
sanitize:
	@$(SETUP) && for kind in address thread; do \
	  tree=build/$$(echo $$kind | sed 's/address/asan/; s/thread/tsan/') && echo "== $$tree" && \
	  cmake --log-level=WARNING -S . -B $$tree -G Ninja -DTPN_MODULE=OFF -DTPN_TESTS=ON -DTPN_SANITIZE=$$kind \
	    -DTPN_CUDA=OFF -DPython_EXECUTABLE="$$PY" && \
	  cmake --build $$tree && ctest --test-dir $$tree --output-on-failure || exit 1; \
	done

# C++ lines that the C++ tests reach, then Python lines that pytest reaches, ranks and commands included.
# Two tables; pytest's summary is the last line. -u: what a forked rank counted is kept (tests/csrc/test_shm.cpp).
# Counting slows a rank down: a C++ test that is too slow for its own deadlines is told, and counted all the same.
coverage:
	@$(SETUP_DEV) && cmake --log-level=WARNING -S . -B build/gcov -G Ninja -DTPN_MODULE=OFF -DTPN_TESTS=ON \
	  -DTPN_CUDA=OFF -DCMAKE_CXX_FLAGS_RELEASE="-Og -g --coverage -fprofile-update=atomic" \
	  -DCMAKE_EXE_LINKER_FLAGS=-Wl,-u,__gcov_dump -DPython_EXECUTABLE="$$PY" && \
	cmake --build build/gcov && find build/gcov -name '*.gcda' -delete && \
	{ ctest --test-dir build/gcov || echo "coverage: counted although a test failed"; } && \
	gcovr --merge-lines --root . --filter csrc/ build/gcov && \
	exec "$$PY" -m pytest --cov --cov-report=term $(ARGS)

soak: ctest
	@$(SETUP) && exec "$$PY" -m pytest -m soak --timeout 7200 $(ARGS)

lint:
	@$(SETUP_DEV) && set -x && \
	ruff check . && ruff format --check . && mypy && \
	$(CXX_FILES) | xargs clang-format --dry-run -Werror

format:
	@$(SETUP_DEV) && ruff check --fix --exit-zero . && ruff format . && $(CXX_FILES) | xargs clang-format -i

bench:
	@PY=$$(sh scripts/setup.sh bench) && mkdir -p build/bench && \
	for file in bench/bench_*.py; do \
	  [ -e "$$file" ] || { echo "bench: no bench/bench_*.py" >&2; exit 1; }; \
	  echo "== $$file"; \
	  "$$PY" "$$file" --json "build/bench/$$(basename "$$file" .py).json" $(ARGS) || [ $$? -eq 77 ] || exit 1; \
	done

# No set-up by pip's index: what it needs is on the machine, see the script.
gpu-check:
	@exec sh scripts/gpu_check.sh $(ARGS)

clean:
	rm -rf build .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
