#!/usr/bin/env bash
# Builds the wheel, installs it into an empty venv and uses it from another folder, as a user would.
#   scripts/check_wheel.sh [PYTHON]     PYTHON has the package `build` (default: .venv/bin/python)
set -euo pipefail

case "${1:-}" in
-h | --help)
  sed -n '2,3s/^# *//p' "$0"
  exit 0
  ;;
esac

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repository"
python=${1:-.venv/bin/python}
[ -x "$python" ] || {
  echo "check_wheel.sh: '$python' is no program: run 'make install' first, or name a Python" >&2
  exit 2
}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "building the wheel ..."
"$python" -m build --outdir "$work/dist" . >"$work/build.log" 2>&1 || {
  cat "$work/build.log"
  exit 1
}
wheel=$(echo "$work"/dist/*.whl)

echo "installing $(basename "$wheel") into an empty venv ..."
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check "$wheel"

# Nothing of the checkout may help: another folder, no PYTHONPATH, no user site, one ordinary CPU device.
cd "$work"
unset PYTHONPATH JAX_NUM_CPU_DEVICES XLA_FLAGS
export PYTHONNOUSERSITE=1 JAX_PLATFORMS=cpu
PATH="$work/venv/bin:$PATH"

python -W error::SyntaxWarning - "$repository" <<'PYTHON'
import sys
from importlib.resources import files

import deepseek_jax
import deepseek_kernels

for module in (deepseek_jax, deepseek_kernels):
    assert not module.__file__.startswith(sys.argv[1]), module.__file__
recipes = files("deepseek_jax") / "configs" / "demo"
assert recipes.is_dir(), f"the wheel has no recipes: {recipes}"
assert (files("deepseek_jax") / "configs" / "models" / "deepseek_v3.py").is_file(), "no recipes of released models"
source = {"cpu.c", "cpu_product.h", "cpu_grouped.h", "cpu_experts.h", "cpu_attention.h"}
assert source <= {file.name for file in files("deepseek_kernels").iterdir()}, "the wheel lacks the CPU kernels' source"
print("imports:", *sorted(recipe.name for recipe in recipes.iterdir() if recipe.name.endswith(".py")))
PYTHON

deepseek-jax --help >/dev/null
deepseek-jax inspect demo/pretrain
# A tiny corpus and pretraining: two steps, and what a run leaves behind.
deepseek-jax corpus demo/corpus --folder runs/corpus --corpus.max-code-bytes 100000 --corpus.train-per-kind 64
deepseek-jax pretrain demo/pretrain --run-dir runs/tiny --loop.steps 2 --loop.eval-every 0 --batch-size 4 \
  --data.path runs/corpus/documents/train.jsonl --data.heldout --data.tokenizer runs/corpus/tokenizer.json
deepseek-jax generate runs/tiny --prompt "import " --max-tokens 4
for file in config.json metrics.jsonl checkpoints; do
  [ -e "runs/tiny/$file" ] || {
    echo "check_wheel.sh: the tiny pretraining left no $file" >&2
    exit 1
  }
done
echo "the wheel works"
