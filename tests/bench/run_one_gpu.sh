#!/usr/bin/env bash
# Everything that a machine with one GPU can tell, in one go: tests, sanitizers, benchmarks, profile. Nothing stops at a
# failure; every part has its own log in the folder and its own time limit, and the end says what failed.
#   tests/bench/run_one_gpu.sh [FOLDER] [PYTHON]      the package is installed, or built in place
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${1:-runs/one_gpu} python=${2:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=()

part() { # part NAME SECONDS COMMAND...
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local status=$?
  echo "$name: status $status after $((SECONDS - started)) s"
  ((status == 0)) || failed+=("$name")
  tail -n "${LINES_SHOWN:-3}" "$out/$name.log" | sed 's/^/    /'
}

share=("$python" -m moe_ep_plugin.share_gpu)
part tests 240 "${share[@]}" -- "$python" -m pytest tests/gpu -q
LINES_SHOWN=24 part throughput 120 "${share[@]}" --ranks 8 -- tests/bench/bench_throughput.py --main --json "$out/main.json"
LINES_SHOWN=24 part small 90 "${share[@]}" --ranks 8 -- tests/bench/bench_throughput.py --small --json "$out/small.json"
part scaling 150 "${share[@]}" --ranks 8 -- tests/bench/bench_throughput.py --scaling --json "$out/scaling.json"
LINES_SHOWN=50 part low_latency 240 "${share[@]}" --ranks 8 -- tests/bench/bench_low_latency.py \
  --json "$out/low_latency.json" --latency-plot "$out/low_latency.png"
LINES_SHOWN=12 part overlap 90 "${share[@]}" --ranks 8 -- tests/bench/bench_low_latency.py \
  --overlap "$out/low_latency_trace.json" --json "$out/overlap.json"
if "$python" -c 'import transformer_engine' 2>/dev/null; then
  LINES_SHOWN=52 part fp8 120 "${share[@]}" --ranks 4 -- tests/bench/bench_fp8.py --json "$out/fp8.json"
fi
part plot 60 "$python" tests/bench/plot_throughput.py "$out/scaling.json" --out "$out/throughput.png"
if command -v compute-sanitizer >/dev/null; then
  part memcheck 120 compute-sanitizer --tool memcheck --error-exitcode 9 "$python" tests/gpu/sanitize.py
  part racecheck 180 compute-sanitizer --tool racecheck --error-exitcode 9 "$python" tests/gpu/sanitize.py
fi
if command -v ncu >/dev/null; then
  LINES_SHOWN=60 part ncu 90 ncu --clock-control none --kernel-name 'regex:dispatch_kernel|combine_kernel' \
    --launch-skip 6 --launch-count 2 --section SpeedOfLight --section MemoryWorkloadAnalysis --section WarpStateStats \
    "$python" tests/bench/profile_kernels.py
fi
((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}"; exit 1; }
