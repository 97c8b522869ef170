#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command of under 9 minutes: builds on the spot with the torch that is there,
# then runs info, parity tests, CUDA graphs, streams, the compiler's report, the benchmarks, compute-sanitizer where there
# is one, and the report. CSVs go to $OUT, or to bench/results; the logs of all parts, one file, gpu.log, there too, or to
# build. GPU_STEMS="combine moments" and GPU_SECONDS=300 make less of it. Where .git did not come along, say
# MTLGRAD_COMMIT=... for the CSVs. torch.compile takes minutes: its contenders are left out.
# A part that fails does not stop the next one. Each has a limit of its own, and leaves time for the later ones: of
# $GPU_SECONDS, 525 unless said otherwise, which all limits scale with. At the end stands what was not run; the exit code
# is 1 where a part failed or did not come to its turn, the report aside.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-bench/results}
log=${OUT:-build}/gpu.log
stems=(${GPU_STEMS:-moments combine adatask host step alphavil})
total=${GPU_SECONDS:-525}
unit=$((total * 1000 / 525))  # milliseconds to a second of the limits below
failed=0
missing=()
mkdir -p "$out" "$(dirname "$log")"
: >"$log"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1

now() { echo $((${EPOCHREALTIME/[.,]/} / 1000)); }
begin=$(now)
remaining() { echo $(((begin + 525 * unit - $(now)) / unit)); }  # in units
seconds() { printf '%d.%03d' $(($1 / 1000)) $(($1 % 1000)); }

# part NAME LIMIT LATER LINES COMMAND...: stops after LIMIT, or earlier where LATER would not be left for what follows; the
# log's last LINES go to the terminal.
part() {
  local name=$1 limit=$2 later=$3 lines=$4 start left code
  shift 4
  start=$(now)
  left=$(($(remaining) - later))
  if ((limit > left)); then limit=$left; fi
  if ((limit < 8)); then
    echo "== $name: not run, no time left" | tee -a "$log"
    missing+=("$name (no time left)")
    failed=1
    return 1
  fi
  timeout --kill-after="$(seconds $((3 * unit)))" "$(seconds $((limit * unit)))" "$@" >"$scratch/log" 2>&1 </dev/null
  code=$?
  local verdict="ok"
  if ((code == 124 || code == 137)); then
    verdict="FAILED: stopped at its limit"
  elif ((code)); then
    verdict="FAILED: exit code $code"
  fi
  echo "== $name: $verdict, $(seconds $(($(now) - start))) s" | tee -a "$log"
  tail -c 1000000 "$scratch/log" >>"$log"  # the whole log stays under the 16 MB that come back from a lent machine
  if ((code)); then
    failed=1
    tail -n 25 "$scratch/log"
    return 1
  fi
  tail -n "$lines" "$scratch/log"
}

absent() {
  echo "== $1: not run, $2" | tee -a "$log"
  missing+=("$1 ($2)")
}

part card 20 450 3 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
part torch 40 430 1 "$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())'
capability=$(tail -n 1 "$scratch/log")
[[ $capability =~ ^[0-9]{2,3}$ ]] || { echo "gpu.sh: expected a CUDA device for $python's torch, found none" >&2; exit 2; }
# Code for the card that is here and no other: a third of the build time.
export CMAKE_ARGS="-DMTLGRAD_REQUIRE_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=${capability}-real ${CMAKE_ARGS:-}"
part build 150 290 3 "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index .

part info 30 280 20 "$python" -c 'import mtlgrad; [print(*item) for item in mtlgrad.build_info().items()]'
# Tests that put their tensors on the GPU say so in their names; the emulator has nothing to say here. Other files of tests
# need packages that a lent machine does not have.
part parity 100 250 4 "$python" -m pytest -q -p no:cacheprovider -k "cuda and not emulated" \
  tests/ops tests/methods
part graphs 45 230 4 "$python" -m pytest -q -p no:cacheprovider tests/contracts/test_graphs.py -k "not stream"
part streams 30 215 4 "$python" -m pytest -q -p no:cacheprovider tests/contracts/test_graphs.py -k stream
if [[ $capability =~ ^(80|90)$ ]]; then
  part resources 60 240 2 "$python" -m bench.resources --arch "sm_$capability" --results "$out/kernels"
else
  absent resources "bench.resources knows the limits of sm_80 and sm_90 alone"
fi

todo=${#stems[@]}
for stem in "${stems[@]}"; do  # an even share of the time for each, what one does not need going to the next
  share=$((($(remaining) - 125) / todo--))
  part "bench $stem" "$share" 120 400 "$python" -m bench "$stem" --device cuda --results "$out" --rounds 30 --seconds 1 \
    --without compiled
done

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
checked=()
for stem in "${stems[@]}"; do [[ $stem =~ ^(combine|adatask|moments)$ ]] && checked+=("$stem"); done
todo=$((3 * ${#checked[@]}))
for tool in memcheck racecheck synccheck; do
  for stem in ${checked[@]+"${checked[@]}"}; do
    if [ -z "$sanitizer" ]; then
      absent "$tool $stem" "no compute-sanitizer here"
      continue
    fi
    share=$((($(remaining) - 20) / todo--))
    part "$tool $stem" $((share < 60 ? share : 60)) 15 2 "$sanitizer" --tool "$tool" --error-exitcode 1 \
      "$python" -m bench "$stem" --quick --device cuda
  done
done

before=$failed
part report 12 0 20 "$python" -m bench.report --check --no-figures
failed=$before  # a card that the README's tables do not have yet is no failure

echo "== $(seconds $(($(now) - begin))) s in all; log: $log"
if ((${#missing[@]})); then printf 'not run: %s\n' "${missing[@]}"; else echo "not run: nothing, all parts came to their turn"; fi
exit $failed
