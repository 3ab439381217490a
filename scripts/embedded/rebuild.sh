#!/usr/bin/env bash
# Rebuild what is embedded, in calls that end in time; a call goes on where the last one with the same WORK stopped.
#
#   rebuild.sh WORK OUT [SECONDS [KEEP]]
#
# WORK     caches, checkpoints and logs. OUT: at the end of every call, tars of all that is finished (15 MiB each).
# SECONDS  this call's time, 585 by default. AUTOENCODER_MINUTES=3 and DIFFUSION_MINUTES=9 are those trainings' times over
#          all calls; with LAST=1 the latter becomes what this call has left, so that this call also measures.
# KEEP     parts taken as shipped instead of trained: readers,captioner by default; none trains everything.
#          On a fresh machine after `python -m scripts.embedded unpack --out TARS`:
#          readers,captioner,autoencoder,diffusion goes on from the diffusion model that was shipped unfinished.
# RENDER_MINUTES=1.8 is the most that rendering takes where nothing is probed.
# GPUS     how many of the machine's, its first ones, where others have other work; all by default.
# FLAGS    more for every phase: FLAGS="--tiny --device cpu --processes 2" proves this script without a GPU.
set -uo pipefail
work=${1:?usage: rebuild.sh WORK OUT [SECONDS [KEEP]]}
out=${2:?usage: rebuild.sh WORK OUT [SECONDS [KEEP]]}
seconds=${3:-585}
keep=${4:-readers,captioner}
started=$(date +%s)
export PYTHONUNBUFFERED=1 CUDA_DEVICE_ORDER=PCI_BUS_ID
mkdir -p "$work" "$out"
gpus=${GPUS:-$(nvidia-smi -L 2> /dev/null | wc -l)}
last=$((gpus > 0 ? gpus - 1 : 0))
((gpus == 0)) || CUDA_VISIBLE_DEVICES=$(seq -s, 0 "$last") && export CUDA_VISIBLE_DEVICES

# shellcheck disable=SC2206
phase=(python3 -m scripts.embedded --work "$work" --keep "$keep" ${FLAGS:-})
say() { echo "== $(($(date +%s) - started)) s: $*"; }
kept() { [[ ,$keep, == *,$1,* ]]; }
finished() { grep -qs '"done": true' "$work/checkpoints/$1.json"; }
finish() { # whatever happened, hand back what there is
  say pack
  "${phase[@]}" pack --out "$out" || cp "$work"/*.log "$out"
}
trap finish EXIT

# The probe takes two GPUs while the others and the CPU cores render. With fewer GPUs they share, so that its figures are
# too high, but in the same order.
probe() { # PHASE GPU
  CUDA_VISIBLE_DEVICES=$2 timeout 110 "${phase[@]}" "$1" --processes "$gpus" > "$work/$1.log" 2>&1
}
if ((gpus > 0)) && [ ! -d "$work/probe" ]; then
  probe probe-autoencoder 0 & probes=($!)
  probe probe-diffusion $((1 % gpus)) & probes+=($!)
  CUDA_VISIBLE_DEVICES=$(seq -s, $((gpus > 2 ? 2 : 0)) "$last") nice -n 10 "${phase[@]}" render --minutes 1.5 || exit
  wait "${probes[@]}"
  timeout 60 "${phase[@]}" probe-team > "$work/probe-team.log" 2>&1
elif [ ! -f "$work/checkpoints/diffusion.pt" ]; then # what a training began with stays as it is
  "${phase[@]}" render --minutes "${RENDER_MINUTES:-1.8}" || exit
fi
# Links that do not work would hang the training.
((gpus < 2)) || [ -f "$work/probe/team.json" ] || phase+=(--processes 1)
grep -hs '^probe: [a-z]* [a-z_]*' "$work"/probe-*.log
say rendered and probed

# Readers and captioner, where they are wanted, train on the last GPU beside the autoencoder.
others=()
for part in readers captioner; do
  kept $part || { CUDA_VISIBLE_DEVICES=$last "${phase[@]}" $part > "$work/$part.log" 2>&1 & others+=($!); }
done
# Several processes failing together, on their links say, must not leave nothing: one then does what it can.
train() { # PHASE ARGUMENT…
  "${phase[@]}" "$@" 2>&1 | tee -a "$work/$1.log" && return
  say "$1 failed; again in one process"
  "${phase[@]}" "$@" --processes 1 2>&1 | tee -a "$work/$1.log"
}
if ! finished autoencoder; then
  train autoencoder --minutes "${AUTOENCODER_MINUTES:-3}" || exit
fi
((${#others[@]})) && wait "${others[@]}"
say autoencoder

# Export and contact sheets take 40 s, loading before the training 20 s, all figures 80 s more.
minutes=${DIFFUSION_MINUTES:-9}
if [ -n "${LAST:-}" ]; then
  used=$(sed 's/.*"seconds": \([0-9]*\).*/\1/' "$work/checkpoints/diffusion.json" 2> /dev/null)
  minutes=$(((${used:-0} + started + seconds - $(date +%s) - 140) / 6))e-1
fi
if ! finished diffusion; then
  train diffusion --minutes "$minutes" --until $((started + seconds - 45)) || exit
fi
say diffusion
[ -d "$work/diffusion" ] || { say no time for diffusion: run this again; exit; }
"${phase[@]}" export || exit
left=$((started + seconds - $(date +%s)))
if finished diffusion && ((left > 100)); then
  "${phase[@]}" evaluate && say all is done
else
  "${phase[@]}" glance
  say not all is done: run this again
fi
