#!/usr/bin/env bash
# What to run first on a GPU, the most valuable part first. Each part has a time of its own and writes as it goes; one
# that fails or is cut off does not stop the next. All of it ends within TOTAL seconds.
#
#   tests/measurements/gpu_hour.sh [PART ...]          (from the repository root; no PART: all of them)
#
#   environment   date, GPU, clocks, driver, versions          10 s
#   selftest      what runs where; every kernel, quickly       45 s
#   hazard        1,000 launches of attention's forward: the same bits, and the right ones     90 s
#   gpu_tests     pytest -m gpu, until the fifth failure       75 s
#   benchmark     python -m kernels.benchmark all --quick     240 s
#   lora          a LoRA step of the 8B model                  90 s
#   alignment     an alignment step of the 8B model            90 s
#
#   RESULTS=docs/results   everything lies in RESULTS/<gpu>/; summary.md has the outcome of each part
#   OUT=                   a folder that gets summary.md and an archive of RESULTS/<gpu>, renewed after every part
#   TOTAL=700              seconds in all: what is left bounds a part, too
#   PYTHON=                the interpreter: .venv/bin/python if it is there, else python3
#   DRY=1                  a try without a GPU, with tiny sizes, into a temporary folder, in under 3 minutes
set -u -o pipefail
cd "$(dirname "$0")/../.."

DRY=${DRY:-}
TOTAL=${TOTAL:-700}
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
RESULTS=${RESULTS:-$([ -n "$DRY" ] && mktemp -d || echo docs/results)}
PARTS=${*:-environment selftest hazard gpu_tests benchmark lora alignment}
export PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 HF_HUB_CACHE=$PWD/tests/config/hub # sizes of published models; weights are random

name=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
gpu=$(echo "${name:-cpu}" | tr '[:upper:]' '[:lower:]' | sed -E 's/[^a-z0-9]+/_/g; s/^_|_$//g')
folder=$RESULTS/$gpu
summary=$folder/summary.md
mkdir -p "$folder"

environment() {
    date --utc
    uname -srm
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu \
        --format=csv || echo "no nvidia-smi"
    git log -1 --format='commit %h %cs %s' 2>/dev/null
    "$PYTHON" - <<'PYTHON'
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

print("python", platform.python_version(), "cuda", torch.version.cuda, "cudnn", torch.backends.cudnn.version())
for name in ("torch", "triton", "flash-attn", "flash-attn-4", "liger-kernel", "cut-cross-entropy", "pydantic", "av"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
if torch.cuda.is_available():
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    print("a product on the GPU:", (x @ x).isfinite().all().item())
PYTHON
}

selftest() {
    "$PYTHON" -m kernels.backend && "$PYTHON" -m kernels.check --quick
}

hazard() {
    if [ -n "$DRY" ]; then
        TRITON_INTERPRET=1 "$PYTHON" -m tests.measurements.hazard_repeats --tiny --repeats 3
    else
        "$PYTHON" -m tests.measurements.hazard_repeats
    fi
}

gpu_tests() {
    local workers=()
    "$PYTHON" -c "import xdist" 2>/dev/null && [ -z "$DRY" ] && workers=(-n 4 --dist worksteal)
    "$PYTHON" -m pytest -m gpu --maxfail 5 --continue-on-collection-errors -v "${workers[@]}" tests/kernels tests/training/test_on_gpu.py
}

benchmark() {
    "$PYTHON" -m kernels.benchmark all --quick --out "$RESULTS" ${DRY:+--seconds 0.002}
}

step() { # CONFIG [OVERRIDE ...]
    "$PYTHON" -m tests.measurements.step_speed "$@" --out "$folder" ${DRY:+--tiny --steps 1}
}

lora() {
    step configs/avlm_8b.yaml --stage 2 'model.lora={rank: 32, alpha: 32.0, base: bf16}' \
        'stages.finetune.train=[lora, vision_projector, audio_projector]'
}

alignment() {
    local mix=()
    [ -z "$DRY" ] && mix=(data.train=synthetic:documents=4,images=8,clips=0)
    step configs/avlm_8b_vision_alignment.yaml "${mix[@]}"
}

seconds_of() {
    case $1 in
        environment) echo 10 ;;
        selftest) echo 45 ;;
        hazard | lora | alignment) echo 90 ;;
        gpu_tests) echo 75 ;;
        benchmark) echo 240 ;;
        *) return 1 ;;
    esac
}

run_part() { # in a shell of its own, so that timeout can end it with all that it started
    local part=$1 limit=$2 started=$SECONDS status outcome
    echo "=== $part (at most $limit s)"
    timeout --kill-after=5 "$limit" bash -c "$(declare -f); $part" 2>&1 | tee "$folder/$part.log"
    status=${PIPESTATUS[0]}
    case $status in
        0) outcome=done ;;
        124 | 137) outcome="cut off" ;;
        *) outcome="failed ($status)" ;;
    esac
    [ "$outcome" = done ] || failed=1
    echo "| $part | $outcome | $((SECONDS - started)) | $(tail -n 1 "$folder/$part.log" | tr '|' '/' | cut -c 1-120) |" >>"$summary"
}

hand_over() {
    [ -z "${OUT:-}" ] && return
    mkdir -p "$OUT"
    tar czf "$OUT/.archive" -C "$RESULTS" "$gpu" && mv "$OUT/.archive" "$OUT/$gpu.tar.gz"
    cp "$summary" "$OUT/summary.md"
}

for part in $PARTS; do
    seconds_of "$part" >/dev/null || { echo "no part $part" >&2; exit 2; }
done
failed=0
export DRY PYTHON RESULTS folder
{
    echo "# First run on ${name:-a machine without a GPU}"
    echo
    echo "\`tests/measurements/gpu_hour.sh $PARTS\`, $(date --utc '+%F %H:%M') UTC${DRY:+, a try with tiny sizes: no measurement}"
    echo
    echo "| part | outcome | seconds | last line |"
    echo "|---|---|--:|---|"
} >"$summary"
for part in $PARTS; do
    limit=$(seconds_of "$part")
    left=$((TOTAL - SECONDS))
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        echo "| $part | not begun: no time left | | |" >>"$summary"
        failed=1
    else
        run_part "$part" "$limit"
    fi
    hand_over
done
echo
cat "$summary"
[ -f "$folder/environment.log" ] && tail -n 20 "$folder/environment.log"
echo "results: $folder"
exit $failed
