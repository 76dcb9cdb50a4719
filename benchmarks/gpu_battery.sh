#!/usr/bin/env bash
# gpu_battery.sh [PACKED]: all that can be shown of training inside a GPU engine's memory, in under nine minutes, in the
# project's root on a machine with one Hopper card. It needs no network. PACKED is a folder with archives of what the
# machine lacks (vllm-py, vllm-C, vllm-fa3, vllm-moe, deps, triton-cache; each .tar.xz); without it vLLM is installed.
#
#   OUT=FOLDER       logs and JSON of each stage (default ./gpu-out)
#   STAGES="facts eager"  only these (default: facts eager graphs flash step27b step2b tests)
#   BUDGET_S=520     seconds for all; a stage gets no more than its own limit, nor than what is left
#
# Every stage has its own time limit, and its failure does not keep the next from running. At the end gpu_battery.py
# writes benchmarks/gpu.json and the table of docs/gpu.md, unless it was a rehearsal on a null GPU (NULLGPU=1).
# Ends with 1 if a stage failed.
set -euo pipefail

PACKED=${1:-}
OUT=${OUT:-$PWD/gpu-out}
STAGES=" ${STAGES:-facts eager graphs flash step27b step2b tests} "
BUDGET_S=${BUDGET_S:-520}
SLOW=${NULLGPU:+8} # a CPU in a card's place takes longer
T0=$SECONDS
say() { printf '== %d s: %s\n' $((SECONDS - T0)) "$*"; }
die() { printf 'gpu_battery.sh: %s\n' "$*" >&2; exit 1; }

[ -d src/secondnature ] || die "found no src/secondnature here; run it in the project's root"
mkdir -p "$OUT"
SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

# ------------------------------------------------------------------------------------------------------ what it needs
packages=""
if [ -n "$PACKED" ]; then
  mkdir "$SCRATCH/packages" "$SCRATCH/triton"
  pids=()
  for name in vllm-py vllm-C vllm-fa3 vllm-moe deps triton-cache; do
    archive=$PACKED/$name.tar.xz
    [ -f "$archive" ] || { say "$archive is not there"; continue; }
    where=$([ $name = triton-cache ] && echo triton || echo packages)
    tar xJf "$archive" -C "$SCRATCH/$where" & pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || die "an archive could not be unpacked"; done
  # Triton's cache names files by full paths, the archive by names only.
  python3 - "$SCRATCH/triton" << 'P'
import json, pathlib, sys
for group in pathlib.Path(sys.argv[1]).glob("*/__grp__*"):
    names = json.loads(group.read_text())["child_paths"]
    group.write_text(json.dumps({"child_paths": {name: str(group.parent / name) for name in names}}))
P
  packages=:$SCRATCH/packages
  export TRITON_CACHE_DIR=$SCRATCH/triton TORCHINDUCTOR_CACHE_DIR=$SCRATCH/inductor VLLM_CACHE_ROOT=$SCRATCH/vllm-cache
fi
python3 benchmarks/gpu_battery.py entry-points "$SCRATCH/dist"
export PYTHONPATH=$SCRATCH/dist:$PWD/src:$PWD/tests$packages${PYTHONPATH:+:$PYTHONPATH}
TORCH=$(python3 -c "import importlib.util as u, os; print(os.path.dirname(os.path.dirname(u.find_spec('torch').origin)))") ||
  die "python3 here has no torch"
# three of vLLM's libraries look for CUDA's compiler where torch has it
export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$TORCH/nvidia/cu13/lib
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} HF_HUB_OFFLINE=1 VLLM_PLUGINS=secondnature
export VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_USE_FLASHINFER_SAMPLER=0
python3 -c "import torch, vllm" || die "python3 here has no vLLM; give the folder of the archives"
say "$(python3 -c 'import sys, torch, triton, transformers as t; print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__, "transformers", t.__version__, "on", torch.cuda.get_device_name())')"

# --------------------------------------------------------------------------------------------------------- the stages
failed=()
# stage NAME SECONDS SHOWN COMMAND...: runs it if it is wanted and time is left; shows the lines of its log that match
stage() {
  local name=$1 limit=$(($2 * ${SLOW:-1})) shown=$3 begun=$SECONDS rc=0 left
  shift 3
  [[ $STAGES == *" $name "* ]] || return 0
  left=$((BUDGET_S * ${SLOW:-1} - (SECONDS - T0)))
  [ "$left" -gt 20 ] || { say "$name: left out, $left s are left"; return 0; }
  [ "$limit" -le "$left" ] || limit=$left
  say "$name: at most $limit s"
  timeout -k 15 "$limit" "$@" > "$OUT/$name.log" 2>&1 || rc=$?
  grep -E "$shown" "$OUT/$name.log" || true
  if [ $rc -eq 0 ]; then
    say "$name: passed in $((SECONDS - begun)) s"
  else
    failed+=("$name")
    say "$name: FAILED with $rc after $((SECONDS - begun)) s (124: its time was over); the end of $OUT/$name.log:"
    tail -15 "$OUT/$name.log"
  fi
}
small=${NULLGPU:+2}
rm -f "$OUT"/*.json
stage facts 60 '^FACT ' python3 benchmarks/gpu_facts.py --json "$OUT/facts.json"
stage eager 110 '^(PROOF|STEP|VERDICT)' python3 benchmarks/gpu_prove.py --steps "${small:-12}" --json "$OUT/eager.json"
stage graphs 150 '^(PROOF|STEP|VERDICT)' python3 benchmarks/gpu_prove.py --steps "${small:-12}" --graphs --json "$OUT/graphs.json"
stage flash 60 '^(PROOF|STEP|VERDICT)' python3 benchmarks/gpu_prove.py --steps "${small:-4}" --backend FLASH_ATTN --json "$OUT/flash.json"
if [ -n "${NULLGPU:-}" ]; then # on the CPU: a number that nobody computed would be read as how many rows there are
  stage step27b 60 '"step_seconds"' python3 benchmarks/gpu.py --preset tiny --device cpu --context 64 --repeats 1 --no-tiles \
    --json "$OUT/step27b.json"
else
  stage step27b 110 '"step_seconds"' python3 benchmarks/gpu.py --preset 27b --repeats 2 --no-tiles --json "$OUT/step27b.json"
  stage step2b 50 '"step_seconds"' python3 benchmarks/gpu.py --preset 2b --repeats 2 --no-tiles --json "$OUT/step2b.json"
  export TESTED_VLLM_OPTIONS='{"attention_config": {"backend": "TRITON_ATTN"}, "additional_config": {"gdn_prefill_backend": "triton"}, "kv_cache_memory_bytes": 268435456}'
  stage tests 300 '(passed|failed|error)' python3 -m pytest -q -p no:cacheprovider tests/train/test_train_cuda.py \
    tests/train/test_train_kernels.py tests/vllm_engine/test_vllm_live.py tests/vllm_engine/test_vllm_cache.py
fi
[ ${#failed[@]} -eq 0 ] || say "FAILED: ${failed[*]}; logs in $OUT"
python3 benchmarks/gpu_battery.py gather "$OUT"
say "done"
[ ${#failed[@]} -eq 0 ]
