#!/usr/bin/env bash
# What only several GPUs of one machine can tell, in one go of less than nine minutes: links, correctness, throughput
# and low-latency operations beside NCCL, the main example. What matters most comes first. Nothing stops at a failure;
# every part has its own log in the folder and its own time limit. The end says what failed or was left out; with either
# the exit status is 1.
#   tests/bench/run_multi_gpu.sh                        a rank on every GPU
#   OUT=FOLDER RANKS=4 PYTHON=python3.12 TOTAL_S=510 ... tests/bench/run_multi_gpu.sh
# REHEARSE=1 runs tiny sizes on the CPU, to try this script. Wheels in .whl/ are installed for this run only.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-runs/multi_gpu} python=${PYTHON:-python3} total=${TOTAL_S:-510} rehearse=${REHEARSE:-}
mkdir -p "$out"
# No NVLink multicast in anything started here: it takes state of the NVLink switches that a host's GPUs share, and where
# a host is lent to several tenants a program that uses it can put their GPUs out of service. None of our kernels does.
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=() skipped=()

part() { # part NAME SECONDS COMMAND...: no longer than what is left of the whole
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  if ((limit > total - SECONDS)); then limit=$((total - SECONDS)); fi
  if ((limit < 5)); then
    echo "$name: left out: the time is used up"
    skipped+=("$name")
    return 1
  fi
  echo "$name: at ${SECONDS} s, at most $limit s"
  timeout -k 10 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null
  local status=$?
  echo "$name: status $status after $((SECONDS - started)) s$( ((status == 124)) && echo ' (time limit)')"
  ((status == 0)) || failed+=("$name")
  tail -n "${LINES_SHOWN:-4}" "$out/$name.log" | cut -c 1-220 | sed 's/^/    /'
  return $status
}

sanity() {
  nvidia-smi -L && nvidia-smi topo -m
  nvidia-smi nvlink -s | head -n 40
  nvidia-smi --query-gpu=index,name,driver_version,clocks.max.sm,clocks.sm,power.limit,memory.total --format=csv
}

# Wheels go to a folder that is removed again, so that they change nothing of this machine.
site=$(mktemp -d) && trap 'rm -rf "$site"' EXIT
if compgen -G '.whl/*.whl' >/dev/null; then
  part wheels 60 "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" .whl/*.whl
  export PYTHONPATH="$PYTHONPATH:$site"
fi

if [[ -n $rehearse ]]; then
  gpus=0 tiny=(--device cpu --backend host --copy-mb 2 --hidden 256 --experts 16 --topk 4 --calls 2)
else
  export -f sanity
  LINES_SHOWN=60 part sanity 20 bash -c sanity
  gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') tiny=()
  module="moe_ep_plugin._extension"
  if ! "$python" -c "from $module import load_cuda, load_host; load_cuda(); load_host()" >"$out/loaded.log" 2>&1; then
    tail -n 1 "$out/loaded.log"
    part build 240 "$python" setup.py build_ext --inplace
  fi
fi
ranks=${RANKS:-$gpus}
if ((ranks < 2)); then
  echo "there are $gpus GPUs and $ranks ranks: at least two of each are needed"
  exit 2
fi
share=("$python" -m moe_ep_plugin.share_gpu)
echo "$ranks ranks on $gpus GPUs; at $SECONDS s"

check=(tests/gpu/multi_gpu.py)
bench=(tests/bench/bench_nvlink.py --local-sms 64 --json "$out/nvlink.json" --plot "$out/nvlink.png" "${tiny[@]}")
low=(tests/bench/bench_low_latency.py --ranks "$ranks" --no-collective "${tiny[@]}")
train=(examples/pretrain_megatron_moe.py --eval-interval 1000)
small=(--steps 40)
large=(--steps 15 --hidden-size 1024 --experts 32 --topk 4 --seq-length 256 --micro-batch-size 16 --dtype bf16)
if [[ -n $rehearse ]]; then
  check+=(--device cpu --random 1 --routings 1)
  bench+=(--main-tokens 16 --tokens 8 --sms 24,4 --batches 2)
  low+=(--tokens 4 --replays 4)
  tiny_model=(--steps 3 --layers 1 --hidden-size 32 --experts 8 --topk 2 --seq-length 32 --micro-batch-size 2)
  small=("${tiny_model[@]}" --eval-windows 10) large=("${tiny_model[@]}" --eval-windows 10)
fi

part correctness 100 "${share[@]}" --ranks "$ranks" -- "${check[@]}"
LINES_SHOWN=180 part nvlink 180 "${share[@]}" --ranks "$ranks" -- "${bench[@]}"
for sms in 24 64; do
  LINES_SHOWN=24 part "low_latency_$sms" 60 "${share[@]}" --ranks "$ranks" -- "${low[@]}" --sms "$sms" \
    --json "$out/low_latency_$sms.json"
done

if "$python" -c 'import megatron.core, matplotlib, tqdm' >"$out/megatron.log" 2>&1; then
  for size in small large; do
    declare -n settings=$size
    for dispatcher in deepep alltoall; do
      LINES_SHOWN=2 part "train_${size}_$dispatcher" 60 "${share[@]}" --ranks "$ranks" -- "${train[@]}" \
        "${settings[@]}" --moe-token-dispatcher "$dispatcher" --out "$out/train_${size}_$dispatcher"
    done
  done
  grep -so '"step_seconds": [0-9.e-]*' "$out"/train_*_*.log | sed "s|^$out/||"
else
  echo "train: left out: $(tail -n 1 "$out/megatron.log")"
  skipped+=(train)
fi

# Groups of 2, 4 and 8 ranks dealt over the GPUs in turn, so that GPUs are also shared: that takes MPS.
if [[ -z $rehearse ]]; then
  LINES_SHOWN=12 part tests 120 "${share[@]}" -- "$python" -m pytest -q -x -p no:cacheprovider \
    tests/gpu/test_exactness_cuda.py tests/gpu/test_collective_cuda.py tests/gpu/test_low_latency_cuda.py \
    -k 'random_routings or every_path or two_runs or cuda_tensors_give or orders or integers'
fi

echo "$SECONDS s; left out: ${skipped[*]:-nothing}; failed: ${failed[*]:-nothing}"
((${#failed[@]} + ${#skipped[@]} == 0))
