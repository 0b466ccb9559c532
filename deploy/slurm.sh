#!/usr/bin/env bash
# A run on SLURM: a Ray cluster over the job's nodes, and the run on it. Not yet run here (see docs/cluster.md).
#
#   sbatch deploy/slurm.sh deploy/configs/demo.toml /shared/runs/demo [section.key=value]...
#
# The same command goes on with a run that is already in that folder. A job that loses a node is put back into the
# queue by SLURM and goes on; so is one whose time is nearly over, after it has saved. A cancelled job stays cancelled.
# NANOGRPO_INTERFACE=ib0 (exported, or sbatch --export=ALL,NANOGRPO_INTERFACE=ib0) names the network to use.
#SBATCH --job-name=nanogrpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append
#SBATCH --output=nanogrpo-%j.log
# With GPUs: #SBATCH --gpus-per-node=1
set -euo pipefail

run=${1:?give a RUN.toml}
folder=${2:?give a run folder on storage that every node sees}
shift 2
if [ -f .venv/bin/activate ]; then . .venv/bin/activate; fi  # sbatch starts in the folder it was called from
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK  # srun does not take it over from sbatch by itself

# Ray's token: made for this job, in a file that only its user may read, on storage that the nodes share.
token=$HOME/.ray-token-$SLURM_JOB_ID
(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$token")
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
steps=()
finish() {
    for step in "${steps[@]}"; do kill "$step" 2>/dev/null || true; done
    rm -f "$token"
}
trap finish EXIT

# Runs on each node: the address that the other nodes reach it by.
# shellcheck disable=SC2016
address_here='ip -o -4 addr show ${NANOGRPO_INTERFACE:+dev $NANOGRPO_INTERFACE} scope global |
    { read -r _ _ _ address _; echo "${address%/*}"; }'
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node=${nodes[0]}
head_ip=$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" bash -c "$address_here")
port=$((20000 + SLURM_JOB_ID % 10000))
cluster=$head_ip:$port
temp=/tmp/ray-$SLURM_JOB_ID  # short: sockets lie in it; its own: other users' jobs have been on this node

srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" \
    ray start --head --block --node-ip-address="$head_ip" --port="$port" --num-cpus="$SLURM_CPUS_PER_TASK" \
    --include-dashboard=false --temp-dir="$temp" &
steps+=($!)
for attempt in $(seq 60); do
    if (exec 3<>"/dev/tcp/$head_ip/$port") 2>/dev/null; then break; fi
    if [ "$attempt" = 60 ]; then echo "Ray's head does not answer at $cluster after 2 minutes" >&2; exit 1; fi
    sleep 2
done

others=$((${#nodes[@]} - 1))
if [ "$others" -gt 0 ]; then
    srun --overlap --nodes="$others" --ntasks="$others" --ntasks-per-node=1 --exclude="$head_node" \
        bash -c "exec ray start --block --address=$cluster --node-ip-address=\"\$($address_here)\" \
            --num-cpus=$SLURM_CPUS_PER_TASK --temp-dir=$temp" &
    steps+=($!)
fi

# All nodes first: a cluster too small for a run is refused at once.
for attempt in $(seq 60); do
    joined=$(python -c "import ray; ray.init('$cluster', log_to_driver=False, logging_level='ERROR'); \
print(sum(node['Alive'] for node in ray.nodes()))" | tail -n 1) || joined=0
    if [ "$joined" = "${#nodes[@]}" ]; then break; fi
    if [ "$attempt" = 60 ]; then echo "only $joined of ${#nodes[@]} nodes have joined Ray" >&2; exit 1; fi
    sleep 2
done

# The run starts its driver again when that is killed.
nanogrpo train "$run" --auto-resume cluster.mode=ray cluster.address="$cluster" cluster.spread=true \
    run.folder="$folder" run.console=plain "$@" &
driver=$!
out_of_time=
trap 'out_of_time=yes; kill -TERM "$driver"' USR1  # the driver saves after its step and ends with 130
code=0
wait "$driver" || code=$?
if [ -n "$out_of_time" ]; then  # the trap has ended the first wait
    code=0
    wait "$driver" || code=$?
    if [ "$code" = 130 ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
