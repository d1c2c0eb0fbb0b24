#!/usr/bin/env bash
# All routers, by budgets of FLOPs and of measured latency, over three seeds: the table of docs/results/routers.md.
#
#     bash benchmarks/routers.sh
#
# About two hours on two cores. A run that is there already is not repeated, so it may be stopped and started again.
set -euo pipefail
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE # two runs at once, one thread each
PYTHON=${PYTHON:-.venv/bin/python}
TABLE=runs/routers-latency.json

if [ ! -f "$TABLE" ]; then # measured once, while nothing else runs
    mkdir -p runs
    "$(dirname "$PYTHON")/nestlm" profile experiment=routers cost=latency cost.batch_size=8 --out "$TABLE"
fi

jobs_list() {
    local cost seed router
    for cost in "cost=flops" "cost=latency cost.batch_size=8 cost.table=$TABLE"; do
        for router in router=uniform router=knapsack router=value "router=value router.policy=static" router=surrogate \
            "router=surrogate router.policy=dynamic router.steps=300 router.signal.entropy_weight=0.03" \
            "router=gumbel" "router=gumbel router.policy=dynamic router.lr=1e-2" router=random router=evolution; do
            for seed in 0 1 2; do
                echo "experiment=routers $cost $router seed=$seed"
            done
        done
    done
}
jobs_list | xargs -P "${JOBS:-2}" -I{} sh -c "$PYTHON train.py {} || exit 255"
"$PYTHON" benchmarks/compare_runs.py runs/routers cost._target_ router.name router.policy
