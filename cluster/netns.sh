#!/usr/bin/env bash
# Several machines on one: network namespaces with addresses and a disk of their own, on a bridge that leads nowhere.
#
#   cluster/netns.sh up 3              machines 1 to 3, with the addresses 10.77.0.1 to 10.77.0.3
#   cluster/netns.sh run 2 COMMAND...  on the second; what it writes below $RAYMERGE_DISK only it sees
#   cluster/netns.sh down              end them, with all that runs on them
#
# Needs root and iproute2. RAYMERGE_DISK is an empty folder of yours, /tmp/raymerge-disk by default.
set -euo pipefail

NET=10.77.0
BRIDGE=raymerge0
STATE=/run/raymerge-netns
DISK=${RAYMERGE_DISK:-/tmp/raymerge-disk}

up() {
    mkdir -p "$STATE" "$DISK"
    ip link add "$BRIDGE" type bridge
    ip link set "$BRIDGE" up
    for ((i = 1; i <= $1; i++)); do
        ip netns add "raymerge$i"
        ip link add "raymerge-v$i" type veth peer name eth0 netns "raymerge$i"
        ip link set "raymerge-v$i" master "$BRIDGE" up
        ip -n "raymerge$i" address add "$NET.$i/24" dev eth0
        ip -n "raymerge$i" link set eth0 up
        ip -n "raymerge$i" link set lo up
        # Holds the machine's view of the disk for as long as it is up.
        # shellcheck disable=SC2016 # the machine's shell expands it
        DISK=$DISK ip netns exec "raymerge$i" unshare --mount --propagation private \
            sh -c 'mount -t tmpfs tmpfs "$DISK" && touch "$DISK/.mounted" && exec sleep infinity' </dev/null >/dev/null 2>&1 &
        echo $! >"$STATE/$i"
        for ((look = 0; look < 100; look++)); do
            run "$i" test -e "$DISK/.mounted" 2>/dev/null && break
            sleep 0.1
        done
        run "$i" test -e "$DISK/.mounted"
    done
}

run() {
    local machine=$1
    shift
    nsenter --target "$(cat "$STATE/$machine")" --mount --net --wd="$PWD" -- "$@"
}

down() {
    local name
    for name in $(ip netns list | awk '/^raymerge[0-9]/ {print $1}'); do
        # Again and again: what is killed may just have started another.
        for ((look = 0; look < 50; look++)); do
            [ -n "$(ip netns pids "$name")" ] || break
            ip netns pids "$name" | xargs kill -9 2>/dev/null || true
            sleep 0.1
        done
        ip netns delete "$name"
    done
    for name in $(ip -oneline link | awk -F '[ :@]+' '/raymerge-v/ {print $2}') "$BRIDGE"; do
        ip link delete "$name" 2>/dev/null || true
    done
    rm -rf "$STATE"
}

case ${1:-} in
    up | down | run) "$@" ;;
    *)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
        exit 2
        ;;
esac
