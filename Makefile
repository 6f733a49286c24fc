# Everything a developer or CI runs. Binaries, models and fetched sources all go below target/.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
TARGET := $(or $(CARGO_TARGET_DIR),target)
RELEASE := $(TARGET)/release

# The pinned compiler that scripts/cuda.sh installs serves every target once it is there.
CUDA_DIR := $(abspath $(TARGET))/cuda/nvidia/cu13
ifneq ($(and $(if $(CUDA_HOME),,unset),$(wildcard $(CUDA_DIR)/bin/nvcc)),)
export CUDA_HOME := $(CUDA_DIR)
endif

.PHONY: build plugin release install package test demo lint deny fuzz sanitize soak setup llama models bindings clean

build: plugin

# GGML_BACKEND_PATH takes any file; the hyphenated name is the one that documentation and packages use.
plugin:
	cargo build --release --workspace
	ln -f $(RELEASE)/libggml_squeeze.so $(RELEASE)/libggml-squeeze.so

# Machine code for every GPU generation since Ampere, PTX for later ones.
release: setup
	CUDA_HOME=$$(scripts/cuda.sh) SQZ_CUDA_ARCHS="80 86 89 90 100 120" $(MAKE) plugin
	scripts/kernels.sh

# Into an absolute PREFIX, with DESTDIR in front of it; builds nothing, so that it can run as root.
PREFIX ?= /usr/local
install:
	DESTDIR="$(DESTDIR)" scripts/install.sh "$(PREFIX)"

package: release
	scripts/package.sh

# --workspace throughout: another set of packages gives llama-cpp-sys-2 other build dependencies, hence a second build of it.
test: export CUDA_HOME := $(or $(CUDA_HOME),$(CUDA_DIR))
test: setup
	scripts/cuda.sh > /dev/null
	$(MAKE) lint deny
	scripts/llama.sh
	scripts/bindings.sh --check
	scripts/models.sh "$${SQZ_MODELS:-$(TARGET)/models}" smollm2
	scripts/models.sh "$${SQZ_MODELS:-$(TARGET)/models}" gemma
	$(MAKE) plugin
	scripts/kernels.sh
	scripts/check-install.sh
	cargo test --release --workspace
	scripts/c-tests.sh
	scripts/conformance.sh
	$(MAKE) soak SOAK="--requests 24 --alone 4"
	scripts/fuzz.sh smoke

demo: setup plugin
	scripts/llama.sh
	scripts/models.sh "$${SQZ_MODELS:-$(TARGET)/models}" smollm2
	scripts/demo.sh

lint:
	cargo fmt --all --check
	cargo clippy --release --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --release --no-deps --workspace

deny:
	scripts/deny.sh

# So many seconds for each target.
FUZZ ?= 1200
fuzz:
	scripts/fuzz.sh $(FUZZ)

# Under AddressSanitizer, ThreadSanitizer, Miri and valgrind: docs/reliability.md.
sanitize:
	scripts/sanitize.sh address thread miri valgrind

SOAK ?=
soak:
	scripts/soak.py $(SOAK)

setup:
	scripts/setup.sh

# For another llama.cpp than the pinned one: make bindings LLAMA_CPP_DIR=...
bindings: setup
	scripts/other-llama.sh "$(LLAMA_CPP_DIR)"

llama:
	scripts/llama.sh

models:
	scripts/models.sh

clean:
	cargo clean
