#!/usr/bin/env bash
# Rebuild everything embedded in SECONDS (default 900) on a GPU machine; phases that were cut go on when it is run again.
# rebuild.sh WORK_FOLDER [SECONDS [DIFFUSION_MINUTES]]. With several GPUs, phases that are independent get one each.
set -uo pipefail
work=${1:?usage: rebuild.sh WORK_FOLDER [SECONDS [DIFFUSION_MINUTES]]}
seconds=${2:-900}
export PYTHONUNBUFFERED=1
mkdir -p "$work"
gpus=$(nvidia-smi -L | wc -l)
phase() { python3 -m scripts.embedded "$@" --work "$work"; }
phase render --minutes 1.8 || exit
CUDA_VISIBLE_DEVICES=$((1 % gpus)) phase readers --minutes 2 > "$work/readers.log" 2>&1 &
CUDA_VISIBLE_DEVICES=$((2 % gpus)) phase captioner --minutes 3.2 > "$work/captioner.log" 2>&1 &
phase autoencoder --minutes 2.6 || exit
# What is left, less the time to load and encode (20 s) and to export and measure (100 s).
minutes=${3:-$(((seconds - SECONDS - 120) / 6))e-1}
phase diffusion --minutes "$minutes" || exit
wait
tail -n 3 "$work/readers.log" "$work/captioner.log"
phase export evaluate
