#!/usr/bin/env bash
# Rebuild what is embedded on one GPU, in calls that end in time; a call goes on where the last one with the same WORK
# stopped, and hands back all that is finished.
#
#   rebuild.sh WORK OUT [PHASE…] [--keep PARTS] [--minutes render=4,diffusion=9]
#
# WORK   caches, checkpoints and logs. OUT: at the end of every call, tars of what is finished (15 MiB each).
# PHASE  of `python -m scripts.embedded --help`; all where none is named. Name export and evaluate in a call of their own
#        where time is short: nothing pauses them.
# GPUS=2 trains the diffusion model on two GPUs; name no other phase then.
# LIMIT_S=560 is when a call pauses. FLAGS="--tiny --device cpu" proves this script without a GPU.
set -uo pipefail
work=${1:?usage: rebuild.sh WORK OUT [PHASE…]}
out=${2:?usage: rebuild.sh WORK OUT [PHASE…]}
shift 2
phases=()
while [[ ${1:---} != --* ]]; do phases+=("$1") && shift; done
export PYTHONUNBUFFERED=1
mkdir -p "$work" "$out"
# shellcheck disable=SC2206
flags=("$@" --work "$work" ${FLAGS:-})
launch=(python3 -m)
[[ ${GPUS:-1} == 1 ]] || launch=(python3 -m torch.distributed.run --nproc-per-node "$GPUS" -m)
"${launch[@]}" scripts.embedded "${phases[@]:-all}" "${flags[@]}" --limit-s "${LIMIT_S:-560}" 2>&1 | tee -a "$work/rebuild.log"
ended=$?
# Whatever happened, hand back what there is: of a training that pauses, the average of its weights so far. A call that
# exports by itself may have written cards, which another export would remove.
if [[ ! " ${phases[*]:-all} " =~ \ (all|export|evaluate)\  && -d $work/autoencoder && -d $work/diffusion/unet ]]; then
    python3 -m scripts.embedded export "${flags[@]}"
fi
python3 -m scripts.embedded pack "${flags[@]}" --keep none --out "$out" || cp "$work/rebuild.log" "$out"
exit $ended
