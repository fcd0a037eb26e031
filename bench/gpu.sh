#!/usr/bin/env bash
# Everything that only a GPU can tell, within nine minutes, what matters most first: bash bench/gpu.sh OUT [PARTS]
#
# PARTS are some of tests,exact,layer,stack,tune,overhead,recording,sanitizer (all of them, in this order). One that
# fails or runs out of time is recorded in OUT/summary.json, and the next one runs. Needs no network and no
# installation beyond torch, triton, pytest and pytest-benchmark. FUSEDRES_DRY=1 runs small sizes without a GPU, to see
# that the script itself works; COMMIT names the commit where there is no git history.
set -u

ALL=tests,exact,layer,stack,tune,overhead,recording,sanitizer
PARTS=${2:-$ALL}
for part in ${PARTS//,/ }; do
    case ",$ALL," in
    *",$part,"*) ;;
    *) echo "PARTS must be some of $ALL, got $part" >&2 && exit 2 ;;
    esac
done
mkdir -p "${1:?usage: bash bench/gpu.sh OUT [PARTS]}"
OUT=$(cd "$1" && pwd)
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
if [ -z "${COMMIT:-}" ] && [ -f COMMIT ]; then COMMIT=$(cat COMMIT); fi
export COMMIT=${COMMIT:-}
TRITON_CACHE_DIR=$(mktemp -d)
export TRITON_CACHE_DIR
trap 'rm -rf "$TRITON_CACHE_DIR"' EXIT

# the package reaches its kernels through a link, which a copy may have lost
[ -f fusedres/kernels/config.py ] || { rm -rf fusedres/kernels && ln -s ../kernels fusedres/kernels; }

STAGES=()
stage() { # part or part-tool, seconds, log, command...; the seconds of all stages together are 540
    local name=$1 limit=$2 log=$3 begin=$SECONDS rc
    shift 3
    case ",versions,$PARTS," in *",${name%%-*},"*) ;; *) return ;; esac
    echo "== $name" | tee -a "$OUT/$log"
    timeout -k 2 "$((limit - 2))" "$@" >>"$OUT/$log" 2>&1
    rc=$?
    STAGES+=("\"$name\": {\"rc\": $rc, \"seconds\": $((SECONDS - begin)), \"limit\": $limit}")
    tail -n "${TAIL:-3}" "$OUT/$log"
    summary
}
summary() {
    local IFS=,
    echo "{\"stages\": {${STAGES[*]}}, \"seconds\": $SECONDS}" >"$OUT/summary.json"
}

XDIST=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then XDIST=(-n 14); fi
BENCH=("$PYTHON" -m pytest bench/ --benchmark -q -p no:cacheprovider -p no:benchmark)
TEST=("$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider --continue-on-collection-errors)

if [ "${FUSEDRES_DRY:-0}" = 1 ]; then
    stage versions 60 versions.txt "$PYTHON" bench/timing.py
    stage tests 120 tests.log "${TEST[@]}" tests/test_exact.py -k "ships or bare"
    stage exact 120 run.log "$PYTHON" bench/exact.py --quick --seeds 1 --jobs 1 --mode fp32 --out "$OUT/exact.json"
    stage layer 120 run.log "${BENCH[@]}" --benchmark-results "$OUT/layer.json" --benchmark-total 60 \
        --benchmark-budget 0 --benchmark-compile-limit 0 -k "cpu and layer-d64-m4096"
    stage stack 120 run.log "${BENCH[@]}" --benchmark-results "$OUT/stack.json" --benchmark-total 60 \
        --benchmark-budget 0 --benchmark-compile-limit 0 -k "cpu and stack-64x4-m16384"
    stage tune 120 run.log "$PYTHON" bench/tune.py --dry --out "$OUT/tiles.json"
    stage overhead 120 run.log "$PYTHON" bench/overhead.py --device cpu --runs 5 --json "$OUT/overhead.json"
    stage recording 60 run.log "$PYTHON" bench/recording.py --rows 16 --budget-s 1 --json "$OUT/recording.json"
else
    stage versions 10 versions.txt "$PYTHON" bench/timing.py
    # every option is a kernel of its own to compile; what is slow needs no GPU
    stage tests 150 tests.log "${TEST[@]}" ${XDIST[@]+"${XDIST[@]}"} -m "not slow" tests
    stage exact 70 run.log "$PYTHON" bench/exact.py --seeds 4 --budget-s 57 --out "$OUT/exact.json" \
        --record "$OUT/swept.json"
    TAIL=60 stage layer 90 run.log "${BENCH[@]}" --benchmark-results "$OUT/layer.json" --benchmark-total 70 \
        --benchmark-budget 1.5 --benchmark-compile-limit 20 -k "cuda and layer"
    TAIL=60 stage stack 60 run.log "${BENCH[@]}" --benchmark-results "$OUT/stack.json" --benchmark-total 42 \
        --benchmark-budget 1.5 --benchmark-compile-limit 20 -k "cuda and stack"
    TAIL=60 stage tune 90 run.log "$PYTHON" bench/tune.py --budget-s 70 --out "$OUT/tiles.json"
    TAIL=24 stage overhead 15 run.log "$PYTHON" bench/overhead.py --runs 100 --json "$OUT/overhead.json"
    stage recording 15 run.log "$PYTHON" bench/recording.py --device cuda --budget-s 2 --json "$OUT/recording.json"
    if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck; do
            stage "sanitizer-$tool" 20 sanitizer.log compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 5 \
                "$PYTHON" bench/exact.py --quick --seeds 1 --jobs 0 --mode bf16 --budget-s 14
        done
    else
        stage sanitizer 5 sanitizer.log sh -c "echo compute-sanitizer is not installed; exit 127"
    fi
fi
cat "$OUT/summary.json"
