#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of under 9 minutes: builds on the spot with the torch that is there,
# runs the tests on the GPU, compute-sanitizer where there is one, and the benchmark. Logs and CSVs go to $OUT, or to
# bench/results. Exits 1 if a part failed, after running the others.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
mkdir -p "$out"
failed=0

# part NAME SECONDS COMMAND...: the log under $out, its end on the terminal
part() {
  local name=$1 seconds=$2 start=$SECONDS
  shift 2
  if timeout --kill-after=10 "$seconds" "$@" >"$out/$name.log" 2>&1; then
    echo "== $name: ok, $((SECONDS - start)) s"
  else
    echo "== $name: FAILED ($?), $((SECONDS - start)) s"
    failed=1
  fi
  tail -n "${LINES_SHOWN:-15}" "$out/$name.log"
}

"$python" -c 'import torch; assert torch.cuda.is_available(), "no usable GPU"; print(torch.__version__, torch.cuda.get_device_name())' || exit 2
# Only for the card that is here: a third of the build time.
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
export CMAKE_ARGS="-DMTLGRAD_REQUIRE_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${capability}-real ${CMAKE_ARGS:-}"
export PYTHONUNBUFFERED=1

part build 150 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index .
part info 20 "$python" -c 'import json, mtlgrad; print(json.dumps(mtlgrad.build_info(), indent=1, default=str))'
part tests 120 "$python" -m pytest -q -x -k "${GPU_TESTS:-cuda or moments or bayesagg}" tests
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer /opt/nvidia/*/compute-sanitizer 2>/dev/null | head -n 1)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck; do
    part "$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 1 "$python" -m bench.bench_moments --quick --device cuda
  done
else
  echo "== compute-sanitizer: not here"
fi
LINES_SHOWN=80 part bench 150 "$python" -m bench.bench_moments --device cuda --results "$out" --rounds 30
exit $failed
