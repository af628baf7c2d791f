#!/usr/bin/env bash
# main.py as the first process of a pod: launch/pod.sh WORKDIR [flags of main.py].
#
# It passes SIGTERM on, and fails (exit code 75) where the run has stopped before its end: Kubernetes takes exit
# code 0 for the end of all, and would not start it again. PYTHON names another interpreter.
set -u
workdir=$1
shift
stopped= child=
trap 'stopped=1; ${child:+kill -TERM "$child"}' TERM
"${PYTHON:-python}" main.py --workdir="$workdir" "$@" &
child=$!
if [[ $stopped ]]; then # before there was a child to tell
  kill -TERM "$child"
fi
wait "$child"
code=$?
while [[ $stopped ]]; do # the signal ended the wait, not the child
  stopped=
  wait "$child"
  code=$?
done
if [[ $code -eq 0 && ! -e $workdir/report.json ]]; then
  exit 75
fi
exit "$code"
