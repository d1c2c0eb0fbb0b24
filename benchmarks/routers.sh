#!/usr/bin/env bash
# All routers, by budgets of FLOPs and of measured latency, over three seeds: the tables of docs/results/routers.md.
#
#     bash benchmarks/routers.sh
#
# About two and a half hours on two cores. Stop it and start it again: a run that is there already is not repeated.
set -euo pipefail
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE # two runs at once, one thread each
PYTHON=${PYTHON:-.venv/bin/python}
TABLE=runs/routers-latency.json

if [ ! -f "$TABLE" ]; then # measured once, while nothing else runs
    mkdir -p runs
    "$(dirname "$PYTHON")/nestlm" profile experiment=routers cost=latency cost.batch_size=8 --out "$TABLE"
fi

LEARNED='router=value
router=value router.policy=static
router=surrogate
router=surrogate router.policy=dynamic router.network.hidden_width=8 router.steps=300 router.signal.entropy_weight=0.03'
BOTH="router=uniform
router=knapsack
$LEARNED
router=gumbel
router=gumbel router.policy=dynamic router.network.hidden_width=8 router.lr=1e-2
router=random
router=evolution"

runs_of() { # the routers, and what they have in common
    local router seed
    while read -r router; do
        for seed in 0 1 2; do
            echo "experiment=routers $2 $router seed=$seed"
        done
    done <<<"$1"
}
{
    runs_of "$BOTH" "cost=flops"
    runs_of "router=uniform
router=knapsack
router=random
$LEARNED" "cost=flops axes=mlp budget=[1.0,0.8,0.75,0.7,0.67] experiment_name=routers-mlp" # the attention stays whole
    runs_of "$BOTH" "cost=latency cost.batch_size=8 cost.table=$TABLE"
} | xargs -P "${JOBS:-2}" -I{} sh -c "$PYTHON train.py {} || exit 255"
for name in routers routers-mlp; do
    "$PYTHON" benchmarks/compare_runs.py "runs/$name" cost._target_ router.name router.policy
done
