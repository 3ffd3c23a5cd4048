#!/usr/bin/env bash
# Runs a command as the first process of a pod; ends with 143 if it was told to stop, whatever the command ends with.
#
# train.py saves on SIGTERM and ends with 0, as somebody who stops it by hand expects. A Job that sees 0 takes the work
# for done and would never start it again; 143 (128 + SIGTERM) makes the JobSet restart it, from what was saved.
set -uo pipefail

stopped=
"$@" &
child=$!
trap 'stopped=1; kill -TERM "$child"' TERM
# A signal ends `wait` early, before the child has saved.
wait "$child"
status=$?
while kill -0 "$child" 2> /dev/null; do
  wait "$child"
  status=$?
done
if [[ $stopped ]]; then exit 143; fi
exit "$status"
