#!/usr/bin/env bash
# Sets every worker of a TPU pod slice up and starts the same recipe on all of them.
#
#   scripts/tpu_pod.sh --name POD --zone ZONE [OPTIONS] COMMAND RECIPE [OVERRIDES...]   from your own machine
#   scripts/tpu_pod.sh --here [OPTIONS] COMMAND RECIPE [OVERRIDES...]                   on a worker: this one only
#
#   scripts/tpu_pod.sh --name my-v5p --zone us-east5-a pretrain demo/pretrain --mesh.fsdp 8
#
#   --project PROJECT   the Google Cloud project (default: gcloud's own)
#   --python PYTHON     Python 3.11 or newer on the workers (default: python3)
#   --setup-only        makes .venv on every worker and shows its devices; COMMAND is not needed
#
# COMMAND is corpus, pretrain, sft or grpo; the recipes of demo/ need what `corpus demo/corpus` writes. From your own
# machine the commit that is checked out (HEAD) is copied to ~/deepseek-jax of every worker, so what runs is what is
# committed; the gcloud CLI has to be logged in. Each worker then runs this script with --here, which sets
# DEEPSEEK_JAX_DISTRIBUTED=1: deepseek-jax joins the other workers through jax.distributed before it does anything else,
# and waits for them. A run's folder (--run-dir) must be one that all workers share, mounted; its checkpoints may go to a
# bucket (--loop.checkpoints gs://BUCKET/FOLDER), for which this installs gcsfs. docs/many-hosts.md tells the rest.
set -euo pipefail

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p;}' "$0"; }

refuse() {
  echo "tpu_pod.sh: $1 (scripts/tpu_pod.sh --help)" >&2
  exit 2
}

here=false
setup_only=false
name=""
zone=""
project=""
python=python3
while [ $# -gt 0 ]; do
  case "$1" in
  -h | --help)
    usage
    exit 0
    ;;
  --here)
    here=true
    shift
    ;;
  --setup-only)
    setup_only=true
    shift
    ;;
  --name | --zone | --project | --python)
    [ $# -ge 2 ] || refuse "$1 needs a value"
    declare "${1#--}=$2"
    shift 2
    ;;
  -*) refuse "unknown option $1" ;;
  *) break ;;
  esac
done

if $here; then
  [ -z "$name$zone$project" ] || refuse "--here runs on this worker alone: it takes no --name, --zone or --project"
else
  [[ -n $name && -n $zone ]] || refuse "--name and --zone say which pod; on a worker itself say --here"
fi
if ! $setup_only; then
  [ $# -ge 1 ] || refuse "no COMMAND: corpus, pretrain, sft or grpo"
  case "$1" in
  corpus | pretrain | sft | grpo) [ $# -ge 2 ] || refuse "$1 needs a RECIPE, such as demo/$1" ;;
  *) refuse "unknown COMMAND '$1': corpus, pretrain, sft or grpo" ;;
  esac
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."

run_here() {
  export DEEPSEEK_JAX_DISTRIBUTED=1
  make setup ACCELERATOR=tpu PYTHON="$python"
  [[ "$*" != *gs://* ]] || .venv/bin/python -m pip install -q gcsfs
  if $setup_only; then
    # Every worker runs this, and the devices of a slice answer only when all of them ask.
    .venv/bin/python -c 'import jax; jax.distributed.initialize(); print(jax.process_index(), jax.local_devices())'
  else
    exec .venv/bin/deepseek-jax "$@"
  fi
}

run_on_all() {
  command -v gcloud >/dev/null || refuse "there is no gcloud here: install the Google Cloud CLI, or say --here on a worker"
  local gcloud=(gcloud compute tpus tpu-vm)
  local pod=(--zone="$zone" --worker=all)
  [ -z "$project" ] || pod+=(--project="$project")
  local command=(bash scripts/tpu_pod.sh --here --python "$python")
  if $setup_only; then command+=(--setup-only); fi

  local archive
  archive=$(mktemp --suffix=.tar.gz)
  # shellcheck disable=SC2064 # the name as it is now
  trap "rm -f '$archive'" EXIT
  git archive --format=tar.gz --output="$archive" HEAD
  echo "copying $(git rev-parse --short HEAD) to every worker of $name ..."
  "${gcloud[@]}" scp "$archive" "$name:deepseek-jax.tar.gz" "${pod[@]}"
  "${gcloud[@]}" ssh "$name" "${pod[@]}" --command="mkdir -p deepseek-jax && \
tar -xzf deepseek-jax.tar.gz -C deepseek-jax && cd deepseek-jax && $(printf '%q ' "${command[@]}" "$@")"
}

if $here; then run_here "$@"; else run_on_all "$@"; fi
