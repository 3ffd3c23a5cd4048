#!/usr/bin/env bash
# A training run on Cloud TPU VMs, from the request for chips to their deletion. See tpu/README.md.
#
#   tpu/pod.sh create                     request the chips and wait for them
#   tpu/pod.sh setup                      send this checkout to every worker, install it, mount the shared folder
#   tpu/pod.sh launch -- TRAIN_FLAGS      start train.py on every worker; the same command again resumes
#   tpu/pod.sh watch  -- TRAIN_FLAGS      follow the run, and resume it whenever the chips are taken away
#   tpu/pod.sh resume -- TRAIN_FLAGS      delete, create, setup and launch, once
#   tpu/pod.sh log                        the last lines of the first worker's log
#   tpu/pod.sh delete                     give the chips back
#
# Settings are environment variables: PROJECT, ZONE, NAME, ACCELERATOR_TYPE, RUNTIME_VERSION, SHARE; and SPOT=1 for
# chips that may be taken away, SLICES=2 for more than one slice, POLL for the seconds between two looks (60), LAUNCHES
# for how often watch restarts a run that failed on the same chips (3).
# --dry_run prints every command and runs none.
set -euo pipefail

MOUNT=/mnt/share
UNIT=adaptive-train
DRY_RUN=
TRAIN_FLAGS=()

fail() { printf 'error: %s\n' "$*" >&2; exit 2; }
say() { printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2; }

# quoted word...: as one would type it.
quoted() {
  local word text=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]] || word=${word@Q}
    text+=" $word"
  done
  printf '%s\n' "${text# }"
}

run() { if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi; }

# setting NAME example: the environment variable must be there.
setting() { [[ ${!1:-} ]] || fail "$1 is not set, such as $1=$2"; }

settings() {
  setting PROJECT my-project
  setting ZONE us-west4-a
  setting NAME my-run
  [[ ${SLICES:-1} =~ ^[1-9][0-9]*$ ]] || fail "SLICES=$SLICES is no number of slices"
  PLACE=(--project="$PROJECT" --zone="$ZONE")
  DESCRIBE=(compute tpus queued-resources describe "$NAME" "${PLACE[@]}" '--format=value(state.state)')
  NODES=("$NAME")
  if (( ${SLICES:-1} > 1 )); then
    # Queued resources number the nodes of a prefix from 0.
    mapfile -t NODES < <(for ((i = 0; i < SLICES; i++)); do printf '%s-%d\n' "$NAME" "$i"; done)
  fi
}

# The workdir must be a folder of the mounted share: every worker writes there, and what replaces it reads it.
train_flags() {
  [[ " ${TRAIN_FLAGS[*]} " == *" --config="* ]] || fail "--config=... is missing after --"
  [[ " ${TRAIN_FLAGS[*]} " == *" --workdir=$MOUNT/"* ]] || fail "--workdir=$MOUNT/... is missing after --"
}

# on_workers command: runs a command on every worker of every slice, one slice after the other, until one fails.
on_workers() {
  local node
  for node in "${NODES[@]}"; do
    run gcloud compute tpus tpu-vm ssh "$node" "${PLACE[@]}" --worker=all --quiet --command="$1" || return
  done
}

create() {
  local nodes=(--node-id="$NAME")
  setting ACCELERATOR_TYPE v5litepod-16
  setting RUNTIME_VERSION v2-alpha-tpuv5-lite
  (( ${SLICES:-1} == 1 )) || nodes=(--node-count="$SLICES" --node-prefix="$NAME")
  run gcloud compute tpus queued-resources create "$NAME" "${PLACE[@]}" "${nodes[@]}" \
    --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" ${SPOT:+--spot} --quiet
  wait_until_active
}

# The state of the request: MISSING if there is none, UNKNOWN if it cannot be told now.
state() {
  local answer
  if answer=$(gcloud "${DESCRIBE[@]}" 2>&1); then
    tail -n 1 <<< "$answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo MISSING
  else
    echo UNKNOWN
  fi
}

wait_until_active() {
  local now last=
  if [[ $DRY_RUN ]]; then
    run gcloud "${DESCRIBE[@]}"
    return
  fi
  while now=$(state); [[ $now != ACTIVE ]]; do
    [[ $now == "$last" ]] || say "chips: $now"
    [[ ! $now =~ ^(FAILED|SUSPENDED|SUSPENDING|MISSING)$ ]] || fail "the request for chips ended as $now"
    last=$now
    sleep "${POLL:-60}"
  done
  say "chips: ACTIVE"
}

setup() {
  local archive=build/pod.tar.gz node
  setting SHARE 'gs://my-bucket or 10.0.0.2:/share'
  run mkdir -p build
  run git archive --format=tar.gz --output="$archive" HEAD
  for node in "${NODES[@]}"; do
    run gcloud compute tpus tpu-vm scp "$archive" "$node:pod.tar.gz" "${PLACE[@]}" --worker=all --quiet
  done
  on_workers "mkdir -p adaptive && tar -xzf pod.tar.gz -C adaptive && \
bash adaptive/tpu/worker.sh $(quoted "$SHARE") $MOUNT"
}

# Under systemd the run outlives the connection, and the shutdown of a worker sends it SIGTERM and waits for its
# checkpoint. A unit of that name from before is removed first.
launch() {
  local command
  train_flags
  command="sudo systemctl stop $UNIT 2> /dev/null; sudo systemctl reset-failed $UNIT 2> /dev/null; "
  command+="sudo systemd-run --unit=$UNIT --uid=\$USER --remain-after-exit --property=TimeoutStopSec=300"
  command+=" --property=StandardOutput=append:\$HOME/train.log --property=StandardError=append:\$HOME/train.log"
  command+=" --setenv=HOME=\$HOME --working-directory=\$HOME/adaptive"
  command+=" \$HOME/adaptive/.venv/bin/python train.py --distributed $(quoted "${TRAIN_FLAGS[@]}")"
  # systemd-run returns at once, so slices start one after the other and wait for each other in jax.distributed.
  on_workers "$command"
}

resume() {
  train_flags
  delete
  create
  setup
  launch
}

# What systemd says of every worker: running, exited (by itself, with 0: the run is finished), failed, or dead.
run_states() { on_workers "systemctl show $UNIT --property=SubState --value" 2> /dev/null || echo unreachable; }

# again action: in a process of its own, where the first command that fails ends it.
again() { "${BASH_SOURCE[0]}" "$1" -- "${TRAIN_FLAGS[@]}" || say "$1 failed; trying again"; }

watch() {
  local chips runs launches=0
  train_flags
  if [[ $DRY_RUN ]]; then
    echo "# every ${POLL:-60} seconds:"
    wait_until_active
    run_states
    echo "# when the chips are SUSPENDED, FAILED or MISSING:"
    resume
    return
  fi
  while true; do
    chips=$(state) runs=
    if [[ $chips == ACTIVE ]]; then runs=$(run_states | sort -u | paste -sd ' '); fi
    say "chips: $chips${runs:+; run: $runs}"
    case $chips:$runs in
      ACTIVE:exited) say "finished"; return ;;
      ACTIVE:*running* | ACTIVE:*unreachable*) ;;
      ACTIVE:*)  # a worker failed, or has restarted and forgotten the run
        (( ++launches <= ${LAUNCHES:-3} )) || fail "the run failed on these chips again; see tpu/pod.sh log"
        again setup
        again launch ;;
      SUSPENDED:* | FAILED:* | MISSING:*)
        launches=0
        again resume ;;
    esac
    sleep "${POLL:-60}"
  done
}

log() {
  run gcloud compute tpus tpu-vm ssh "${NODES[0]}" "${PLACE[@]}" --worker=0 --quiet --command="tail -n 50 train.log"
}

delete() {
  # Nothing to delete is what a watch finds after somebody else deleted it.
  if [[ ! $DRY_RUN && $(state) == MISSING ]]; then return; fi
  run gcloud compute tpus queued-resources delete "$NAME" "${PLACE[@]}" --force --quiet
}

main() {
  local action=${1:-}
  [[ $action =~ ^(create|setup|launch|watch|resume|log|delete)$ ]] ||
    fail "'$action' is none of create, setup, launch, watch, resume, log, delete"
  shift
  while (( $# )); do
    case $1 in
      --dry_run) DRY_RUN=1 ;;
      --) shift; TRAIN_FLAGS=("$@"); break ;;
      *) fail "unknown argument '$1'; flags of train.py stand after --" ;;
    esac
    shift
  done
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  settings
  "$action"
}

main "$@"
