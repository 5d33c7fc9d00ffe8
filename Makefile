# Every target works in an activated environment (see README.md); `make install` fills the active one.
PYTHON ?= python
BUILD = deploycc build

.PHONY: install test slow check docs demo clean

install:
	$(PYTHON) -m pip install -c constraints.txt -e ".[dev]"

test:
	$(PYTHON) -m pytest

slow:
	$(PYTHON) -m pytest -m slow

check:
	ruff format --check .
	ruff check .
	mypy
	MYPYPATH=benchmarks mypy benchmarks/*.py
	lint-imports

docs:
	deploycc passes --markdown > docs/passes.md
	$(PYTHON) -m pip install -q -c constraints.txt -e ".[docs]"
	mkdocs build --strict --site-dir build/site

demo:
	$(BUILD) examples/fashion/cnn.onnx --precision mixed --eval examples/fashion/eval.npz
	deploycc explain cnn.deploycc

clean:
	rm -rf build dist *.egg-info *.deploycc .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
