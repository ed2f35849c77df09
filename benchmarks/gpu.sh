#!/usr/bin/env bash
# Everything that only a GPU can show, in one go: bash benchmarks/gpu.sh [FOLDER]
# Correctness of the CUDA paths first, then costs and speed, then the main job at a real size (Fashion-MNIST where
# $HASTEN_DATA or ../shared/data holds it, else digits). Results: benchmarks/results/*-cuda.json and FOLDER/report.*.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-runs/gpu}"
data="${HASTEN_DATA:-../shared/data}/fashion_mnist.npz"
[ -f "$data" ] || data=digits
python="${PYTHON:-.venv/bin/python}"

"$python" -c "import torch; assert torch.cuda.is_available(), 'no CUDA device'"
HASTEN_TEST_DEVICE=cuda "$python" -m pytest tests/test_cuda.py tests/test_torchao.py -q
"$python" benchmarks/forwards.py --device cuda --width 512 --depth 8 --batch 1024
"$python" benchmarks/overhead.py --device cuda
"$python" benchmarks/memory.py --device cuda
"$python" -m hasten ledger fashion-mnist --stack benchmarks/gpu-stack.yaml --device cuda --steps 50 --cfg-scale 1.5 \
  --batch 64 --count 256 --out "$out/ledger"
cp "$out/ledger/ledger.json" benchmarks/results/ledger-cuda.json
"$python" -m hasten tune fashion-mnist --max-loss psnr=30 --device cuda --steps 50 --cfg-scale 1.5 --batch 64 \
  --out "$out/plan.yaml"
"$python" -m hasten demo --data "$data" --device cuda --minutes 10 --out "$out"
cp "$out/report.json" benchmarks/results/demo-cuda.json
