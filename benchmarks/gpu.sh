#!/usr/bin/env bash
# Measures what docs/performance.md has to say about a GPU, step by step:
#
#     benchmarks/gpu.sh [--tiny] [--out DIR] [--only STEP]
#
# A step writes its rows to DIR/STEP.jsonl once it is complete, and what it printed to DIR/STEP.log. A step
# that is complete is not run again, so that an interrupted run goes on where it stopped. A step whose packages
# are missing is skipped with a line. At the end the script prints all rows as a table.
#
#   --tiny       small networks, one round, without torch.compile: a check that runs on a CPU
#   --out DIR    where the results go (gpu-results)
#   --only STEP  run this step alone
#
# PYTHON chooses the interpreter (python). It needs this package with JAX for the GPU, and for the comparisons
# torch for the GPU, diffusers and transformers.
set -u
cd "$(dirname "$0")/.."
tiny=0 out=gpu-results only=
while [ $# -gt 0 ]; do
  case $1 in
    --tiny) tiny=1 ;;
    --out) out=${2:?--out needs a folder}; shift ;;
    --only) only=${2:?--only needs a step}; shift ;;
    *) echo "unknown argument $1; the arguments are --tiny, --out DIR and --only STEP" >&2; exit 2 ;;
  esac
  shift
done
python=${PYTHON:-python} failed=0 known=
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out" || exit 1

has() {  # whether Python finds the packages
  "$python" -c "import importlib.util as u, sys; sys.exit(not all(u.find_spec(p) for p in sys.argv[1:]))" "$@"
}

if ! has jax flax optax; then
  echo "$python finds no jax, flax and optax: install this package first, or name another PYTHON" >&2
  exit 1
fi
if [ $tiny = 0 ] && [ "$("$python" -c 'import jax; print(jax.default_backend())' 2>/dev/null)" != gpu ]; then
  echo "jax sees no GPU: pip install \"jax[cuda12]\", or check the script with --tiny" >&2
  exit 1
fi
peers=() compile=(--compile)
if [ $tiny = 1 ]; then
  compile=()
  peers=(--alone)
elif ! has torch || ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "torch sees no GPU: the peers are left out"
  peers=(--alone)
fi

step() {  # NAME "PACKAGES" SCRIPT ARGUMENTS...
  local name=$1 packages=$2 started=$SECONDS
  shift 2
  known="$known $name"
  if [ -n "$only" ] && [ "$only" != "$name" ]; then return; fi
  if [ -s "$out/$name.jsonl" ]; then echo "$name: done before"; return; fi
  # shellcheck disable=SC2086
  if ! has $packages; then echo "$name: skipped, it needs $packages"; return; fi
  rm -f "$out/$name.partial"
  if "$python" "$@" --json "$out/$name.partial" >"$out/$name.log" 2>&1; then
    mv "$out/$name.partial" "$out/$name.jsonl"
    echo "$name: done in $((SECONDS - started)) s"
  else
    failed=1
    echo "$name: FAILED, see $out/$name.log: $(grep -v '^\s*$' "$out/$name.log" | tail -n 1)"
  fi
}

weights="torch diffusers transformers"  # the sampling benchmarks write their random weights with these
trained=""
[ ${#peers[@]} = 1 ] || trained=$weights
if [ $tiny = 1 ]; then
  karlo=(--size tiny --rounds 1 --steps 1) sd=(--size tiny --steps 2 --rounds 1)
  decoder=(--network tiny --batch 2) prior=(--network prior --batch 2) clip=(--network clip --batch 2)
  rounds=(--rounds 1 --steps 1) eight=prior_diffusion
else
  karlo=(--rounds 3 --repeats 3) sd=(--rounds 3 --repeats 3)
  decoder=(--network karlo --batch 32) prior=(--network karlo_prior --batch 256)
  clip=(--network clip_l14 --batch 64) rounds=(--rounds 5 --steps 20) eight=whole
fi
karlo+=("${peers[@]}" "${compile[@]}") sd+=("${peers[@]}" "${compile[@]}")
half=(--dtype bfloat16 "${rounds[@]}" "${peers[@]}" "${compile[@]}")
step karlo-1 "$weights" benchmarks/sampling.py "${karlo[@]}" --part whole --captions 1
step karlo-8 "$weights" benchmarks/sampling.py "${karlo[@]}" --part $eight --captions 8
step sd15-1 "$weights" benchmarks/stable_diffusion.py "${sd[@]}" --captions 1
step sd15-8 "$weights" benchmarks/stable_diffusion.py "${sd[@]}" --captions 8
step decoder-train "jax $trained" benchmarks/training.py "${decoder[@]}" "${half[@]}"
step prior-train "jax $trained" benchmarks/training.py "${prior[@]}" "${half[@]}"
step clip-train "jax $trained" benchmarks/training.py "${clip[@]}" "${half[@]}"

if [ -n "$only" ] && [[ " $known " != *" $only "* ]]; then
  echo "there is no step $only; the steps are$known" >&2
  exit 2
fi
shopt -s nullglob
rows=("$out"/*.jsonl)
if [ ${#rows[@]} -gt 0 ]; then
  echo
  "$python" benchmarks/measure.py "${rows[@]}" >"$out/table.md" && cat "$out/table.md"
fi
exit $failed
