#!/usr/bin/env bash
# Compiles requirements/*.txt from pyproject.toml. No index address is written, so any mirror can serve them.
set -euo pipefail
cd "$(dirname "$0")/.."

compile() { # NAME SOURCE [uv option...]
  local name=$1
  shift
  .venv/bin/uv pip compile -q "$@" --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
    --custom-compile-command "make lock" --output-file "requirements/$name.txt"
}
compile operator pyproject.toml --extra=operator
# Images have no pip: what a spec may ask for has to be in them. cv2 is what rapidocr needs of it (see override-dependencies).
compile trainer pyproject.toml - --extra={trainer,rewards,s3} <<<"opencv-python-headless>=4.10"
compile serving pyproject.toml --extra={serving,s3}
compile dev pyproject.toml --extra={operator,trainer,serving,dev}
# PyTorch and what it brings, as trainer.txt and serving.txt have it: the layer that images share.
compile torch - --constraint requirements/dev.txt <<<"torch"
# What installs the others: uv, as dev.txt has it.
compile uv - --constraint requirements/dev.txt <<<"uv"
# What turns sources into wheels inside images/*.Containerfile: ours, and those of packages that ship none (deepspeed).
compile build - <<<$'hatchling>=1.27\nsetuptools\nwheel'
