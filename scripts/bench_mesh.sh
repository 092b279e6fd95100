#!/usr/bin/env bash
# Measures this project on the 2, 4 or 8 GPUs of one host, and prints one table in under ten minutes.
#
#   scripts/bench_mesh.sh [PART ...] [--seconds 560] [--small]
#
#   train     the train step on 1, 2, 4 and 8 devices, by each axis
#   equal     ten steps' losses and routing on meshes, beside one device's
#   whole     V2-Lite whole, trained on all devices
#   flags     what XLA's options for collectives are worth; not without being named
#   dispatch, decode, v3-decode, v3-train, context   see scripts/bench_mesh_parts.py
#
# --small is a try on emulated CPU devices (JAX_NUM_CPU_DEVICES=8) with tiny networks. Figures: docs/results/gpus.md.
# PYTHON names the Python (default: .venv's, else python3).
set -uo pipefail
cd "$(dirname "$0")/.." || exit
case " $* " in *" -h "* | *" --help "*) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"; exit 0 ;; esac
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.93} # NCCL wants some beside
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-/tmp/bench_mesh_cache}
# Multicast over NVLink leaves GPUs of shared hosts in a state that needs a reset.
export NCCL_NVLS_ENABLE=0
exec "$python" scripts/bench_mesh.py "$@"
