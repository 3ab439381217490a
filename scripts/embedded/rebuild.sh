#!/usr/bin/env bash
# Rebuild everything embedded on one GPU: about 14 minutes on an H200. Rerun it after an interruption: phases resume.
# rebuild.sh WORK_FOLDER [SECONDS]: stops cleanly resumable after SECONDS, for machines that are lent in pieces.
set -uo pipefail
work=${1:?usage: rebuild.sh WORK_FOLDER [SECONDS]}
deadline=$((SECONDS + ${2:-86400}))
export PYTHONUNBUFFERED=1
phase() { timeout $((deadline - SECONDS)) python3 -m scripts.embedded "$@" --work "$work"; }
phase render --minutes 2.6 || exit
phase readers --minutes 3 > "$work/readers.log" 2>&1 &
phase captioner --minutes 4 > "$work/captioner.log" 2>&1 &
phase autoencoder --minutes 4 || exit
wait
tail -n 4 "$work/readers.log" "$work/captioner.log"
phase diffusion --minutes 9.5 || exit
phase export evaluate
