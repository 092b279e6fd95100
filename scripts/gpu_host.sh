#!/usr/bin/env bash
# Sets a host with NVIDIA GPUs up and starts a recipe on all of them.
#
#   scripts/gpu_host.sh [OPTIONS] COMMAND [RECIPE] [OVERRIDES...]
#   scripts/gpu_host.sh demo
#   scripts/gpu_host.sh pretrain demo/pretrain --mesh.data 8
#
#   --accelerator cuda12|cuda13   the JAX build (default: the newest that the driver runs)
#   --python PYTHON               Python 3.11 or newer (default: python3)
#   --setup-only                  makes .venv and shows the devices; COMMAND is not needed
#
# COMMAND is demo, corpus, pretrain, sft or grpo; demo/pretrain needs what `corpus demo/corpus` writes. A set-up that is
# there already is used as it is.
set -euo pipefail

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"; }

refuse() {
  echo "gpu_host.sh: $1 (scripts/gpu_host.sh --help)" >&2
  exit 2
}

driver_build() { # the JAX build for the CUDA version that the driver supports
  command -v nvidia-smi >/dev/null || refuse "there is no nvidia-smi here: install NVIDIA's driver first"
  local version
  version=$(nvidia-smi | sed -n 's/.*CUDA[^:]*Version: *\([0-9]*\)\..*/\1/p' | head -n 1)
  case "$version" in
  12) echo cuda12 ;;
  1[3-9]) echo cuda13 ;;
  *) refuse "nvidia-smi names CUDA '${version:-no version}', 12 or newer is needed: update the driver" ;;
  esac
}

accelerator=""
python=python3
setup_only=false
while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help)
    usage
    exit 0
    ;;
  --accelerator | --python)
    [ $# -ge 2 ] || refuse "$1 needs a value"
    if [ "$1" = --python ]; then python=$2; else accelerator=$2; fi
    shift 2
    ;;
  --setup-only)
    setup_only=true
    shift
    ;;
  -*) refuse "unknown option $1" ;;
  *) break ;;
  esac
done

if ! $setup_only; then
  [ $# -ge 1 ] || refuse "no COMMAND: demo, corpus, pretrain, sft or grpo"
  case "$1" in
  demo) ;;
  corpus | pretrain | sft | grpo) [ $# -ge 2 ] || refuse "$1 needs a RECIPE, such as demo/$1" ;;
  *) refuse "unknown COMMAND '$1': demo, corpus, pretrain, sft or grpo" ;;
  esac
fi
case "$accelerator" in
"") accelerator=$(driver_build) ;;
cuda12 | cuda13) ;;
*) refuse "--accelerator '$accelerator' is not cuda12 or cuda13" ;;
esac

cd "$(dirname "${BASH_SOURCE[0]}")/.."
make setup ACCELERATOR="$accelerator" PYTHON="$python"
.venv/bin/python - <<'PYTHON'
import sys

import jax

print(f"jax {jax.__version__}:", *(device.device_kind for device in jax.devices()))
if jax.default_backend() != "gpu":
    sys.exit(f"gpu_host.sh: jax found no GPU, only {jax.devices()}")
PYTHON
$setup_only || exec .venv/bin/deepseek-jax "$@"
