# Every target does all the set-up it needs from a fresh clone: virtual environment, pinned packages, build.
PYTHON ?= python3
RANKS ?= 2
ARGS ?=
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest
# Where there is no GPU the CUDA code is built for one architecture, from which a driver compiles it for any later one.
WHEEL_OPTIONS := $(if $(wildcard /dev/nvidiactl),,--config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES=80-virtual)
# The C++ tests there: for the one of which ptxas tells what spills.
TEST_ARCHITECTURE := $(if $(wildcard /dev/nvidiactl),,-DCMAKE_CUDA_ARCHITECTURES=90-real)
SOURCES := $(shell find cpp cuda python -type f -not -name '*.pyc') CMakeLists.txt pyproject.toml
CXX_FILES := $(shell find cpp cuda tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export CMAKE_BUILD_PARALLEL_LEVEL ?= 2

.PHONY: bench bench-quick chat classify clean custom-optimizer data docs evaluate finetune format help lint notebook pipeline setup site test test-all test-cpp test-python train train-two-phase
.DEFAULT_GOAL := help

help:
	@echo "make train      train a language model on $(RANKS) ranks (ARGS='--help' lists its options)"
	@echo "make train-two-phase   the same from an autoencoder's embedding, compared with a cold start"
	@echo "make evaluate   what a trained model is worth (ARGS=PATH: results, a checkpoint or a model's folder)"
	@echo "make notebook   runs examples/notebook.ipynb into runs/notebook.ipynb"
	@echo "make classify   fine-tune a pretrained BERT on news of the BBC on $(RANKS) ranks"
	@echo "make finetune   fine-tune a small model on dialogues, with rounds of self-training; make chat talks to it"
	@echo "make custom-optimizer   train with an optimizer of one's own, every stage beside plain PyTorch"
	@echo "make pipeline   train a GPT whose layers are on $(RANKS) ranks"
	@echo "make data       brings the data of the examples into data/ (text, news, mails, dialogues, a pretrained BERT)"
	@echo "make test       all tests of a change; make test-all adds the long ones"
	@echo "make lint       ruff, mypy --strict, clang-format; make format repairs what can be"
	@echo "make bench      speed against the floors and the peers, with DeepSpeed installed for it;"
	@echo "                make bench-quick does a part of it in about five minutes"
	@echo "make docs       rewrites docs/config.md, docs/config.schema.json and docs/deepspeed.md"
	@echo "make site       builds the pages of docs/ and a reference of all calls into build/site"

setup: .venv/installed

.venv/installed: constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch
	$(BIN)/pip install -q '.[data,docs,examples,monitor,test,lint]' $(WHEEL_OPTIONS)
	touch $@

LAUNCH = @$(BIN)/python examples/launch.py --standalone --nproc-per-node $(RANKS)
GET = @$(BIN)/python examples/get_data.py

train: .venv/installed
	$(LAUNCH) examples/pretrain_lm.py $(ARGS)

# A language model over a learned vocabulary, from an autoencoder's embedding and from a cold start.
TWO_PHASE := --text data/brown.txt --tokenizer bpe --vocabulary 4000 --model lstm --layers 1 --embedding 128 --hidden 256
TWO_PHASE += --context 64 --steps 300 --eval-every 50 --lr 4e-3 --autoencoder --compare
TWO_PHASE += --out runs/two-phase --checkpoints checkpoints/two-phase

train-two-phase: .venv/installed
	$(GET) brown
	$(LAUNCH) examples/pretrain_lm.py $(TWO_PHASE) $(ARGS)

classify: .venv/installed
	$(GET) bbc minilm
	$(LAUNCH) examples/classify.py --model data/all-minilm-l6-v2 --steps 40 $(ARGS)

finetune: .venv/installed
	$(GET) dialogues
	$(LAUNCH) examples/finetune_chat.py $(ARGS)

chat: .venv/installed
	@test -e runs/chat/config.json || $(MAKE) --no-print-directory finetune ARGS=
	@$(BIN)/python examples/chat.py runs/chat $(ARGS)

evaluate: .venv/installed
	@$(BIN)/python examples/evaluate.py $(if $(ARGS),$(ARGS),runs/pretrain)

custom-optimizer: .venv/installed
	$(LAUNCH) examples/custom_optimizer.py $(ARGS)

pipeline: .venv/installed
	$(LAUNCH) examples/pipeline_gpt.py --pipe $(RANKS) --schedule zb-v $(ARGS)

notebook: .venv/installed
	@mkdir -p runs
	@$(BIN)/jupyter-execute examples/notebook.ipynb --output=../runs/notebook.ipynb

data: .venv/installed
	$(GET) $(ARGS)

test: test-cpp test-python

BESIDE := tests/distributed/pipeline  # so that both take equally long

# Half of the time one process computes or waits: so the tests of several ranks run beside the others. Last and alone
# come those that look at what the whole machine has.
test-python: .venv/installed
ifneq ($(ARGS),)
	$(PYTEST) -m "not slow" $(ARGS)
else
	@mkdir -p build; $(PYTEST) -m "not slow and not alone" tests/unit tests/e2e tests/gpu $(BESIDE) > build/tests-beside.log 2>&1 & \
	beside=$$!; $(PYTEST) -m "not slow and not alone" tests/distributed $(BESIDE:%=--ignore %); ranks=$$?; \
	wait $$beside; beside=$$?; cat build/tests-beside.log; \
	$(PYTEST) -m "not slow and alone" tests/distributed/promises; alone=$$?; \
	exit $$((ranks || beside || alone))
endif

test-cpp: .venv/installed
	@test -e /usr/include/gtest/gtest.h || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
	  apt-get update -q && apt-get install -y -q libgtest-dev; } || echo "GoogleTest: CMake will fetch it"
	for preset in release asan; do \
	  PATH="$(CURDIR)/$(BIN):$$PATH" sh -c "cmake --preset $$preset $(TEST_ARCHITECTURE) && cmake --build --preset $$preset && ctest --preset $$preset -j 2" || exit 1; \
	done

test-all: test-cpp .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" sh -c "cmake --preset tsan && cmake --build --preset tsan && ctest --preset tsan -j 2"
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --preset asan-all -j 2 -R Emulated
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --preset stress
	$(BIN)/python -m pytest $(ARGS)
	$(BIN)/python -m pytest tests/distributed --transport torch -m "not slow" $(ARGS)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# The site, and what its reference is made of, need no network once that is installed.
site: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/site/index.html"

docs: .venv/installed
	$(BIN)/python -m partita.config.document docs
	$(BIN)/python -m partita.compat.deepspeed.document docs

.venv/bench: .venv/installed
	$(BIN)/pip install -q '.[bench]'
	touch $@

bench: .venv/bench
	PATH="$(CURDIR)/$(BIN):$$PATH" sh bench/run.sh

bench-quick: .venv/bench
	PATH="$(CURDIR)/$(BIN):$$PATH" sh bench/run.sh quick

clean:
	rm -rf .venv build dist
