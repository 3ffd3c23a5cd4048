#!/usr/bin/env bash
# Plays gcloud: writes down how it was called, and answers every question with the next line of a file of answers.
printf '%s\n' "$*" >> "$CALLS"
case "$*" in
  *" describe "*) file=$ANSWERS.chips ;;
  *"systemctl show"*) file=$ANSWERS.run ;;
  *) exit 0 ;;
esac
answer=$(head -n 1 "$file")
# The last answer stands.
if [[ $(wc -l < "$file") -gt 1 ]]; then sed -i 1d "$file"; fi
if [[ $answer == fail:* ]]; then
  echo "${answer#fail:}" >&2
  exit 1
fi
tr ' ' '\n' <<< "$answer"
