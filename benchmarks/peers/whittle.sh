#!/usr/bin/env bash
# Puts whittle, with the older libraries that it needs, into an environment of its own, and what our decoder needs beside it.
set -euo pipefail
cd "$(dirname "$0")"
python3 -m venv whittle
whittle/bin/pip install --quiet "torch==2.13.0" "litgpt==0.5.12" "transformers<4.54" "syne-tune[moo]==0.13.0" \
  "lm-eval<0.4.9.1" "datasets<4" "pyarrow<21" "huggingface-hub<0.35" tensorboard \
  "lightning>=2.6,<3" "torchmetrics>=1.8" "hydra-core>=1.3,<1.4" "omegaconf>=2.3,<2.4" rich typer
whittle/bin/pip install --quiet --no-deps "whittle==0.6.0"
