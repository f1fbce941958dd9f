#!/usr/bin/env bash
# LSP on GPU nodes under Slurm: one process a GPU, restarted when it fails, requeued when it is preempted or out of time.
#
#   NODES=2 GPUS_PER_NODE=8 PRESET=recommended_lsp_8b OUTPUT_DIR=/shared/runs/one experiments/launch/slurm.sh [FIELDS...]
#
# FIELDS go to lsp-jax train. Partition, account and time limit are Slurm's own variables (SBATCH_PARTITION,
# SBATCH_ACCOUNT, SBATCH_TIMELIMIT). lsp-jax must be on PATH, from an environment that all nodes see.
set -euo pipefail

# Slurm runs a copy of this file from its spool directory: where it lay is handed on.
here=${LSP_LAUNCH_DIR:-$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)}
# shellcheck source=experiments/launch/common.sh
source "$here/common.sh"

need_number NODES "number of nodes"
need_number GPUS_PER_NODE "GPUs of each node"
CPUS_PER_GPU=${CPUS_PER_GPU:-8}
set_train "$@"
set_environment
# XLA takes three quarters of a GPU's memory when nothing is said
ENVIRONMENT+=("XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.95}")

submit() {
  export LSP_LAUNCH_DIR=$here # sbatch hands the environment on
  # USR1 comes to the batch script alone, two minutes before the time limit. No --gpus-per-task: a process picks its GPU
  # by its number on the node, so it must see them all.
  run sbatch --job-name="lsp-$PRESET" --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" \
    --gpus-per-node="$GPUS_PER_NODE" --cpus-per-task="$CPUS_PER_GPU" --requeue --signal=B:USR1@120 \
    --open-mode=append --output="$OUTPUT_DIR.slurm-%j.log" "$here/slurm.sh" "$@"
}

work() {
  local status=0 loop
  trap 'echo "time limit near: requeued" >&2; scontrol requeue "$SLURM_JOB_ID"' USR1
  # one process that fails takes the others with it: all start again together
  restart run env "${ENVIRONMENT[@]}" srun --kill-on-bad-exit=1 --cpus-per-task="$CPUS_PER_GPU" "${TRAIN[@]}" &
  loop=$!
  wait "$loop" || status=$?
  while kill -0 "$loop" 2>/dev/null; do # the trap ended the wait, not the loop
    status=0
    wait "$loop" || status=$?
  done
  return "$status"
}

if [[ -n ${LSP_LAUNCH_DIR:-} ]]; then
  work
else
  submit "$@"
  if [[ -n ${DRY_RUN:-} ]]; then work; fi
fi
