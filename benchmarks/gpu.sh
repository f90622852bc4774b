#!/usr/bin/env bash
# Everything that needs a GPU, in one call of a quarter of an hour at most: the tests marked `gpu`, then for each preset in bf16 time,
# arithmetic, memory and a profile by class of kernel.
#
#   benchmarks/gpu.sh OUT [PRESET…]     on the machine with the GPU; presets: 172m 425m 1.5b
#   benchmarks/gpu.sh --wheels          beforehand, where packages can be fetched, if the machine with the GPU can fetch
#                                       none: wheels for its python3 (PYTHON_VERSION, 3.12) into .whl/, which travels
#
# OUT gets tests.log, steps.jsonl, profile.jsonl and device.txt. python3 must have a torch with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "${1:-}" = --wheels ]; then
  grep -hoE '^(megatron-core|faiss-cpu)==[0-9.]+' requirements.txt | xargs \
    python3 -m pip download --quiet --no-deps --only-binary=:all: --dest .whl --implementation cp \
    --python-version "${PYTHON_VERSION:-3.12}" --platform manylinux2014_x86_64 --platform manylinux_2_27_x86_64 \
    --platform manylinux_2_28_x86_64
  ls -l .whl
  exit
fi

out=${1:?benchmarks/gpu.sh OUT [PRESET…]}
shift
mkdir -p "$out"
out=$(cd "$out" && pwd)
python3 -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"'
if ! python3 -c 'import megatron.core, faiss' 2> /dev/null; then
  python3 -m pip install --quiet --no-deps --no-index --target "$out/packages" .whl/*.whl
  export PYTHONPATH="$out/packages"
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv > "$out/device.txt" || true
python3 -c 'import torch; print("torch", torch.__version__)' >> "$out/device.txt"

status=0
timeout 240 python3 -m pytest -m gpu -q -o addopts= tests 2>&1 | tee "$out/tests.log" || status=$?
[ $# -gt 0 ] || set -- 172m 425m 1.5b
for preset; do
  models=(gpt retro)
  [ "$preset" != 172m ] || models+=(plain)
  what=(--preset "$preset" --dtype bf16)
  timeout 240 python3 benchmarks/train_step.py "${what[@]}" --model "${models[@]}" | tee -a "$out/steps.jsonl" || status=$?
  timeout 120 python3 benchmarks/profile_step.py "${what[@]}" | tee -a "$out/profile.jsonl" || status=$?
done
rm -rf "$out/packages"
exit "$status"
