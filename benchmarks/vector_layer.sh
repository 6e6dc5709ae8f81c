#!/usr/bin/env bash
# Times benchmarks/vector_layer.cpp over three vector layers, and how long each takes to compile.
# Needs torch in $PYTHON and Debian's libhwy-dev.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
TORCH=$("$PYTHON" -c 'import torch; print(torch.__path__[0])')
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
for isa in "x86-64-v4 -mprefer-vector-width=512" "x86-64-v3"; do
  for layer in COMPILER ATEN HIGHWAY; do
    capability=AVX512; [[ $isa == *v3* ]] && capability=AVX2
    start=$(date +%s%N)
    # shellcheck disable=SC2086
    c++ -std=gnu++20 -O3 -march=$isa -fno-math-errno -fno-trapping-math -Wno-psabi -DLAYER_$layer \
      -DCPU_CAPABILITY=$capability -DCPU_CAPABILITY_$capability -DHWY_COMPILE_ONLY_STATIC -DAT_BUILD_ARM_VEC256_WITH_SLEEF=0 \
      -Icsrc -isystem "$TORCH/include" -isystem "$TORCH/include/torch/csrc/api/include" \
      benchmarks/vector_layer.cpp -o "$OUT/$layer" -L"$TORCH/lib" -ltorch_cpu -lc10 -Wl,-rpath,"$TORCH/lib" -lhwy
    seconds=$(( ($(date +%s%N) - start) / 10000000 ))
    printf '%-11s %-9s compiled in %s.%02d s: ' "$capability" "$layer" $((seconds / 100)) $((seconds % 100))
    "$OUT/$layer"
  done
done
