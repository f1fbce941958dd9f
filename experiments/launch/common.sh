# Sourced by the launchers: what they ask of the environment, the command of every host, the restart loop.
# shellcheck shell=bash

MAX_RESTARTS=${MAX_RESTARTS:-100}
RESTART_WAIT=${RESTART_WAIT:-30} # seconds; sockets and device memory of the run that ended are free by then

# die TEXT: one line, and the status that means bad input everywhere in this project.
die() {
  echo "$(basename "$0"): error: $*" >&2
  exit 2
}

# need NAME MEANING: the variable must be set and not empty.
need() {
  [[ -n ${!1:-} ]] || die "$1 is not set: $2"
}

# need_number NAME MEANING
need_number() {
  need "$1" "$2"
  [[ ${!1} =~ ^[1-9][0-9]*$ ]] || die "$1 = ${!1}: must be a whole number above 0 ($2)"
}

# set_train FIELDS...: TRAIN is the command of every host. Every restart is this same command.
set_train() {
  need PRESET "a preset of lsp-jax train, such as recommended_lsp_3b"
  need OUTPUT_DIR "the run's folder, on storage that all hosts share"
  [[ $OUTPUT_DIR == /* ]] || die "OUTPUT_DIR = $OUTPUT_DIR: must be an absolute path that is the same on all hosts"
  TRAIN=(lsp-jax train --preset "$PRESET" --resume auto --output-dir "$OUTPUT_DIR" "$@")
}

# set_environment: ENVIRONMENT is NAME=VALUE for every host. Compiled programs and downloaded models lie beside the run,
# so that a restart, on other machines too, neither compiles nor downloads again.
set_environment() {
  local shared
  shared=$(dirname "$OUTPUT_DIR")
  ENVIRONMENT=(
    "JAX_COMPILATION_CACHE_DIR=$shared/compilation-cache"
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0"
    "HF_HOME=${HF_HOME:-$shared/huggingface}"
  )
}

# run COMMAND...: runs it, or prints it when DRY_RUN is set.
run() {
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# restart COMMAND...: again and again until it succeeds. Bad input (2) and Ctrl-C (130) stay what they are however often
# they are repeated; everything else is a machine that went away, or may be.
restart() {
  local count=0 status
  while true; do
    status=0
    "$@" || status=$?
    case $status in
      0) return 0 ;;
      2 | 130) echo "exit status $status: not restarted" >&2 && return "$status" ;;
    esac
    if ((count >= MAX_RESTARTS)); then
      echo "exit status $status after $count restarts (MAX_RESTARTS): given up" >&2
      return "$status"
    fi
    count=$((count + 1))
    echo "exit status $status: restart $count of $MAX_RESTARTS in $RESTART_WAIT s" >&2
    sleep "$RESTART_WAIT"
  done
}
