#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of under 9 minutes: builds on the spot with the torch that is there,
# runs the tests, the benchmarks (GPU_STEMS="combine" for some), and compute-sanitizer where there is one. Logs and CSVs
# go to $OUT, or to bench/results.
# A part that fails or finds no time left does not stop the next one; the exit code is then 1.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
deadline=$((SECONDS + 525))
failed=0
mkdir -p "$out"
export PYTHONUNBUFFERED=1

# part NAME SECONDS LINES COMMAND...: the whole log under $out, its last LINES on the terminal
part() {
  local name=$1 limit=$2 lines=$3 start=$SECONDS
  shift 3
  if ((limit > deadline - SECONDS)); then limit=$((deadline - SECONDS)); fi
  if ((limit < 15)); then
    echo "== $name: no time left"
    failed=1
  elif timeout --kill-after=5 "$limit" "$@" >"$out/gpu_$name.log" 2>&1; then
    echo "== $name: ok, $((SECONDS - start)) s"
    tail -n "$lines" "$out/gpu_$name.log"
  else
    echo "== $name: FAILED (exit code $?), $((SECONDS - start)) s"
    tail -n 40 "$out/gpu_$name.log"
    failed=1
  fi
}

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || exit 2
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
# Code for the card that is here and no other: a third of the build time.
export CMAKE_ARGS="-DMTLGRAD_REQUIRE_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${capability}-real ${CMAKE_ARGS:-}"

part build 150 3 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index .
part info 30 20 "$python" -c 'import mtlgrad; [print(*item) for item in mtlgrad.build_info().items()]'
chosen=${GPU_TESTS:-cuda or moments or bayesagg or combine or displace or align or jacobian or adatask or optim or alphavil}
part tests 120 5 "$python" -m pytest -q -k "$chosen" tests
for stem in ${GPU_STEMS:-combine adatask step alphavil moments}; do
  part "bench_$stem" 150 400 "$python" -m bench "$stem" --device cuda --results "$out" --rounds 30 --seconds 3
done
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
  for stem in ${GPU_STEMS:-combine adatask moments}; do
    for tool in memcheck racecheck; do
      part "${tool}_$stem" 60 3 "$sanitizer" --tool "$tool" --error-exitcode 1 \
        "$python" -m bench "$stem" --quick --device cuda
    done
  done
else
  echo "== compute-sanitizer: not here"
fi
exit $failed
