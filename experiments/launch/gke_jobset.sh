#!/usr/bin/env bash
# LSP on TPU slices of a GKE cluster with JobSet (0.6 or newer) installed: renders the JobSet and applies it.
#
#   NAME=lsp IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/lsp-jax:0.1.0 ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 \
#   CLAIM=shared PRESET=recommended_lsp_3b OUTPUT_DIR=/mnt/lsp/runs/one experiments/launch/gke_jobset.sh [FIELDS...]
#
# FIELDS go to lsp-jax train. SLICES=2: several slices; SPOT=1: on preemptible nodes; CHIPS_PER_HOST: 4 unless said;
# NAMESPACE: default unless said. DRY_RUN=1 prints the JobSet. A secret `huggingface` with the key `token`, if there is
# one, is the hub's token for gated models.
set -euo pipefail
# shellcheck source=experiments/launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MOUNT=/mnt/lsp
need NAME "name of the JobSet"
need IMAGE "container image with lsp-jax[tpu] installed"
need ACCELERATOR "TPU of the node pool, such as tpu-v5-lite-podslice or tpu-v6e-slice"
need TOPOLOGY "chips of one slice, such as 4x4"
need CLAIM "PersistentVolumeClaim that many nodes may write, mounted on $MOUNT"
set_train "$@"
set_environment
SLICES=${SLICES:-1} CHIPS_PER_HOST=${CHIPS_PER_HOST:-4} NAMESPACE=${NAMESPACE:-default}
need_number SLICES "number of slices"
need_number CHIPS_PER_HOST "chips of one host"
[[ $OUTPUT_DIR == $MOUNT/* ]] || die "OUTPUT_DIR = $OUTPUT_DIR: must be below $MOUNT, where CLAIM is mounted"
[[ $TOPOLOGY =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || die "TOPOLOGY = $TOPOLOGY: must be like 4x4 or 2x2x2"
for name in NAME NAMESPACE CLAIM ACCELERATOR; do
  [[ ${!name} =~ ^[a-z0-9]([-a-z0-9]*[a-z0-9])?$ ]] || die "$name = ${!name}: small letters, digits and - only"
done
chips=$((${TOPOLOGY//x/*}))
((chips % CHIPS_PER_HOST == 0)) || die "TOPOLOGY = $TOPOLOGY: $chips chips are no multiple of CHIPS_PER_HOST = $CHIPS_PER_HOST"
hosts=$((chips / CHIPS_PER_HOST))

# text VALUE: a YAML string in double quotes. $(NAME) would be a variable to Kubernetes.
text() {
  local value=${1//\\/\\\\} opening='$('
  value=${value//\"/\\\"}
  value=${value//$'\n'/\\n}
  printf '"%s"' "${value//"$opening"/"\$$opening"}"
}

command=$(for word in "${TRAIN[@]}"; do text "$word" && printf ', '; done)
environment=$(for entry in "${ENVIRONMENT[@]}"; do
  printf '                    - {name: %s, value: %s}\n' "${entry%%=*}" "$(text "${entry#*=}")"
done)
spot_selector='' tolerations=''
if [[ -n ${SPOT:-} ]]; then
  spot_selector='cloud.google.com/gke-spot: "true"'
  tolerations='{key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}'
fi

# All pods fail together (backoffLimit 0) and start together; a lost node counts as a failure like any other. Exit status
# 2 is bad input: the Job then fails by its pod failure policy, and with it the JobSet, without a restart.
render() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
  namespace: $NAMESPACE
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
      - name: badinput
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      replicas: $SLICES
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          completionMode: Indexed
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: lsp, operator: In, values: [2]}
          template:
            spec:
              restartPolicy: Never
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $ACCELERATOR
                cloud.google.com/gke-tpu-topology: $TOPOLOGY
                $spot_selector
              tolerations: [$tolerations]
              containers:
                - name: lsp
                  image: $(text "$IMAGE")
                  command: [${command%, }]
                  env:
$environment
                    - name: HF_TOKEN
                      valueFrom: {secretKeyRef: {name: huggingface, key: token, optional: true}}
                  resources:
                    limits: {google.com/tpu: $CHIPS_PER_HOST}
                  volumeMounts: [{name: shared, mountPath: $MOUNT}]
              volumes:
                - name: shared
                  persistentVolumeClaim: {claimName: $CLAIM}
YAML
}

if [[ -n ${DRY_RUN:-} ]]; then
  render
else
  render | kubectl apply -f -
fi
