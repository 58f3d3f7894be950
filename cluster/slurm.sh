#!/usr/bin/env bash
# A raymerge command on Ray across the nodes of a Slurm job, which lasts as long as the command does:
#
#   sbatch --nodes=4 cluster/slurm.sh merge recipe.yml /shared/out
#
# Submit with RayMerge's environment active. The environment, the models, the output and the home directory stand on
# storage that all nodes share. RAYMERGE_HEAD_ADDRESS says by which address the first node is reached where its name
# does not; RAYMERGE_START_SECONDS how long nodes may take to join.
#SBATCH --job-name=raymerge
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
# Ray counts all cores and all memory of a node as its own.
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
# This script hears of the time limit a minute before it comes, and cleans up. The same command goes on later.
#SBATCH --signal=B:TERM@60
set -euo pipefail

fail() {
    echo "slurm.sh: $*" >&2
    exit 1
}

[ $# -gt 0 ] || fail "no command; for example: sbatch cluster/slurm.sh merge recipe.yml /shared/out"
[ -n "${SLURM_JOB_NODELIST:-}" ] || fail "this is not a Slurm job; for example: sbatch cluster/slurm.sh $*"
command -v ray > /dev/null || fail "there is no 'ray' here; activate RayMerge's environment before sbatch"

names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
mapfile -t nodes <<< "$names"
limit=${RAYMERGE_START_SECONDS:-300}

running=()
token=""
stop() {
    trap - EXIT
    if [ ${#running[@]} -gt 0 ]; then
        kill "${running[@]}" 2> /dev/null || true
        wait "${running[@]}" || true
    fi
    rm -f "$token"
}
trap stop EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

# Whoever has the token may run anything on the cluster: a new one each time, in a file that only its owner reads.
token=$(mktemp "$HOME/.raymerge-token.XXXXXX")
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$token RAY_USAGE_STATS_ENABLED=0
# Nodes would show their metrics to anyone, without a token.
export RAY_enable_metrics_collection=0
unset RAY_AUTH_TOKEN RAY_ADDRESS

# On a node: Ray until it is told to end, its files where no other user reaches them (Ray opens its own folder to all).
# Tensors travel through files, so little is kept for objects.
serve() {
    folder=$(mktemp -d /tmp/ray.XXXXXX)
    trap 'kill $!' TERM
    ray start --block --temp-dir="$folder/ray" --object-store-memory=1073741824 "$@" &
    wait
    # A signal ends the first wait, not Ray.
    wait
    # A process of Ray's may outlive it for a moment, and write.
    while [ -e "$folder" ]; do
        rm -rf "$folder"
        sleep 1
    done
}

start() {
    local node=$1
    shift
    srun --nodes=1 --ntasks=1 --nodelist="$node" bash -c "$(declare -f serve); serve \"\$@\"" serve "$@" &
    running+=($!)
}

num_nodes() {
    # Ray waits long for a head that does not answer.
    (: < "/dev/tcp/${1%:*}/${1##*:}") 2> /dev/null || return
    python - "$1" << 'END' 2> /dev/null
import sys
import ray
ray.init(sys.argv[1], log_to_driver=False)
print(sum(node["Alive"] for node in ray.nodes()))
END
}

# Return when this many nodes have joined; fail when one has ended, or the time is over.
await() {
    local count=$1 found process
    while found=$(num_nodes "$RAY_ADDRESS") || true; [ "${found:-0}" -lt "$count" ]; do
        for process in "${running[@]}"; do
            kill -0 "$process" 2> /dev/null || fail "Ray has ended on a node; what it said is above"
        done
        [ $SECONDS -lt "$limit" ] || fail "${found:-0} of ${#nodes[@]} nodes have joined $RAY_ADDRESS in $limit s"
        sleep 1
    done
}

free_port() {
    python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
}

# The address by which nodes reach the first one, which runs this script, is that of its name. Some systems give a
# node's own name a loopback address, which others cannot use.
head_address() {
    local found=${RAYMERGE_HEAD_ADDRESS:-}
    if [ -z "$found" ]; then
        found=$(getent ahostsv4 "${nodes[0]}" | awk 'NR == 1 {print $1}') || true
        case $found in
            "" | 127.*) fail "${nodes[0]} has address '$found' here; set RAYMERGE_HEAD_ADDRESS to one others reach" ;;
        esac
    fi
    echo "$found"
}

# On a single node the command starts Ray by itself.
if [ ${#nodes[@]} -gt 1 ]; then
    address=$(head_address)
    port=$(free_port)
    options=(--head --node-ip-address="$address" --port="$port" --include-dashboard=false)
    # Where gRPC is installed Ray starts a server for remote clients too, at a port that another job may have.
    if python -c 'import grpc' 2> /dev/null; then
        options+=(--ray-client-server-port="$(free_port)")
    fi
    export RAY_ADDRESS=$address:$port
    start "${nodes[0]}" "${options[@]}"
    await 1
    for node in "${nodes[@]:1}"; do
        start "$node" --address="$RAY_ADDRESS"
    done
    await ${#nodes[@]}
    echo "slurm.sh: Ray runs on ${#nodes[@]} nodes"
fi

# In the background, because a shell that waits for a command in the foreground hears no signal.
python -m raymerge "$@" &
command=$!
running+=("$command")
wait "$command"
