#!/usr/bin/env bash
# Puts litgpt beside the project's own packages, for benchmarks/dense_decoder.py: without what it needs for other things,
# which would bring an older transformers.
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/python -m pip install --quiet --no-deps --target benchmarks/peers/packages "litgpt==0.5.12" psutil jsonargparse docstring-parser typeshed-client
