#!/usr/bin/env bash
# Puts litgpt beside the project's own packages, for benchmarks/dense_decoder.py: without what it needs for other things,
# which would bring an older transformers. whittle needs that older one, and an environment of its own:
#   python3 -m venv VENV && VENV/bin/pip install "torch==2.13.0" "litgpt==0.5.12" "transformers<4.54" \
#     "syne-tune[moo]==0.13.0" "lm-eval<0.4.9.1" "datasets<4" "pyarrow<21" "huggingface-hub<0.35" tensorboard
#   VENV/bin/pip install --no-deps whittle
set -euo pipefail
cd "$(dirname "$0")/../.."
.venv/bin/python -m pip install --quiet --no-deps --target benchmarks/peers/packages "litgpt==0.5.12" psutil jsonargparse docstring-parser typeshed-client
