#!/usr/bin/env bash
# LSP on a Cloud TPU pod slice: gets the slice, installs, runs the same command on all hosts, and does all of it again when
# the slice is preempted. Keep it running in tmux on a machine with gcloud.
#
#   TPU_NAME=lsp ZONE=us-west4-a ACCELERATOR=v5litepod-16 RUNTIME=v2-alpha-tpuv5-lite NFS=10.0.0.2:/share \
#   SOURCE='lsp-jax[tpu] @ git+https://HOST/lsp-jax@v0.1.0' PRESET=recommended_lsp_3b OUTPUT_DIR=/mnt/lsp/runs/one \
#     experiments/launch/tpu_pod.sh [FIELDS...]
#
# FIELDS go to lsp-jax train. PROJECT: not gcloud's own; SPOT=1: preemptible. The queued resource and its node are both
# called TPU_NAME; one of that name that is FAILED or SUSPENDED is deleted and asked for again.
set -euo pipefail
# shellcheck source=experiments/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MOUNT=/mnt/lsp
need TPU_NAME "name of the slice"
need ZONE "zone, such as us-west4-a"
need ACCELERATOR "accelerator type, such as v5litepod-16 or v6e-16"
need RUNTIME "TPU software version, such as v2-alpha-tpuv5-lite or v2-alpha-tpuv6e"
need NFS "shared storage HOST:/SHARE (Filestore), mounted on $MOUNT"
need SOURCE "what pip installs, such as 'lsp-jax[tpu] @ git+https://HOST/lsp-jax@TAG'"
set_train "$@"
[[ $OUTPUT_DIR == $MOUNT/* ]] || die "OUTPUT_DIR = $OUTPUT_DIR: must be below $MOUNT, where NFS is mounted"
set_environment

quoted() { printf '%q ' "$@"; }

# tpu GROUP VERB...: gcloud for this slice.
tpu() { run gcloud compute tpus "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"} --quiet; }

on_all_hosts() { tpu tpu-vm ssh "$TPU_NAME" --worker=all --command="$1"; }

create() {
  tpu queued-resources create "$TPU_NAME" --node-id="$TPU_NAME" --accelerator-type="$ACCELERATOR" \
    --runtime-version="$RUNTIME" ${SPOT:+--spot}
}

# The slice is there, or is asked for until it is.
ensure() {
  local state
  while true; do
    state=$(tpu queued-resources describe "$TPU_NAME" --format='value(state.state)' 2>/dev/null) || state=
    case $state in
      ACTIVE) return 0 ;;
      '') create || return 1 ;;
      FAILED | SUSPENDED) tpu queued-resources delete "$TPU_NAME" --force || return 1 ;;
      *) sleep "${POLL:-60}" ;;
    esac
  done
}

# Mounts and installs what is not there yet. The image's Python is older than 3.11, so uv brings one.
set_up() {
  local mount install
  mount="sudo apt-get install -qq -y -o DPkg::Lock::Timeout=600 nfs-common && sudo mkdir -p $MOUNT"
  mount+=" && sudo mount -t nfs $(quoted "$NFS") $MOUNT"
  install="python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --python 3.12 ~/lsp"
  install+=" && ~/.local/bin/uv pip install -q --python ~/lsp/bin/python $(quoted "$SOURCE")"
  on_all_hosts "(mountpoint -q $MOUNT || ($mount)) && ([ -x ~/lsp/bin/lsp-jax ] || ($install))"
}

# A run whose connection broke still holds the chips: its number is kept where a reboot forgets it, and it is ended first.
train() {
  local old='old=$(cat /dev/shm/lsp-jax.pid 2>/dev/null) && grep -q lsp-jax /proc/$old/cmdline && kill -9 $old && sleep 5'
  on_all_hosts "($old) 2>/dev/null; echo \$\$ > /dev/shm/lsp-jax.pid; PATH=~/lsp/bin:\$PATH exec env $(
    quoted "${ENVIRONMENT[@]}" "${TRAIN[@]}"
  )"
}

attempt() {
  ensure || return 1
  set_up || return 1 # a failed installation is worth another try, whatever its status
  train
}

if [[ -n ${DRY_RUN:-} ]]; then
  create
  set_up
  train
else
  restart attempt
fi
