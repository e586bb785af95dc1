#!/usr/bin/env bash
# Two hosts on one machine, to try jobs of several hosts; the drills of the tests use the same.
#
#   launch/local_cluster.sh namespaces up [MBIT] [HOSTS]   network namespaces, llm4msr1 and llm4msr2 (or
#                                                  more), with 10.77.0.1, 10.77.0.2 …, MBIT (200) each way
#   launch/local_cluster.sh slurm up               a real Slurm with two virtual nodes and accounting
#   launch/local_cluster.sh slurm fail NODE        node1 or node2 loses its power
#   launch/local_cluster.sh slurm mend NODE        … and is switched on again
#   launch/local_cluster.sh namespaces|slurm down  as it was before
#
# Needs root. What is missing is installed from Debian's packages; LLM4MSR_INSTALL=0 forbids that.
# LLM4MSR_NAMESPACES names them otherwise (at most 10 letters), so that two of these do not meet.
# State is kept in $LLM4MSR_CLUSTER (default /var/tmp/llm4msr-cluster). Everything listens on the loopback or
# on the namespaces' own bridge. Exit code 3: not possible on this machine, says why.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin  # where tc, munged and Slurm's daemons are; not every root's shell looks there
S=${LLM4MSR_CLUSTER:-/var/tmp/llm4msr-cluster}
export SLURM_CONF=$S/slurm.conf
N=${LLM4MSR_NAMESPACES:-llm4msr}
HOSTS_MARK="# llm4msr local cluster"

cannot() { echo "local_cluster: not possible here: $*" >&2; exit 3; }
root() { [ "$(id -u)" = 0 ] || cannot "root is needed"; }
waits() { # waits SECONDS COMMAND…: until the command succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ "$SECONDS" -lt "$end" ] || { echo "local_cluster: gave up waiting for: $*" >&2; return 1; }
    sleep 0.2
  done
}

needs() { # needs "COMMAND…" PACKAGE…: installs Debian's packages if a command is missing
  local missing=() log
  for tool in $1; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  shift
  [ ${#missing[@]} = 0 ] && return
  [ "${LLM4MSR_INSTALL:-1}" = 1 ] || cannot "missing: ${missing[*]}"
  command -v apt-get >/dev/null || cannot "missing, and no apt-get to install them: ${missing[*]}"
  log=$(mktemp)
  # No service of the packages is to start by itself: the cluster starts its own.
  DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 timeout 240 sh -c \
    'apt-get update -qq; apt-get install -y -qq --no-install-recommends "$@"' sh "$@" \
    >"$log" 2>&1 || cannot "apt-get install $* failed: $(tail -n 1 "$log")"
  rm -f "$log"
}

# ---------------------------------------------------------------- network namespaces

namespaces_up() {
  root
  needs "ip tc" iproute2
  namespaces_down
  ip link add "${N}0" type bridge 2>/dev/null || cannot "the kernel gives no bridge"
  ip link set "${N}0" up
  for n in $(seq "${2:-2}"); do
    ip netns add "$N$n" || cannot "the kernel gives no network namespace"
    ip link add "${N}0p$n" type veth peer name eth0 netns "$N$n"
    ip link set "${N}0p$n" master "${N}0" up
    ip -n "$N$n" link set lo up
    ip -n "$N$n" addr add "10.77.0.$n/24" dev eth0
    ip -n "$N$n" link set eth0 up
    tc -n "$N$n" qdisc add dev eth0 root tbf rate "${1:-200}mbit" burst 256kb latency 50ms ||
      cannot "the kernel limits no bandwidth (tbf)"
  done
  echo "try: ip netns exec ${N}1 ip -brief addr"
}

namespaces_down() {
  for n in $(seq 9); do
    ip link del "${N}0p$n" 2>/dev/null || true # at once; the kernel removes a namespace's own later
    ip netns del "$N$n" 2>/dev/null || true
  done
  ip link del "${N}0" 2>/dev/null || true
}

# ---------------------------------------------------------------- Slurm

slurm_configure() {
  local secret; secret=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
  mkdir -p "$S/state" "$S/database" "$S/run" "$S/log"
  head -c 128 /dev/urandom >"$S/munge.key"; chmod 600 "$S/munge.key"
  echo "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY '$secret'; CREATE DATABASE slurm;
    GRANT ALL ON slurm.* TO slurm@'127.0.0.1';" >"$S/database.sql"
  cat >"$S/slurmdbd.conf" <<END
AuthType=auth/munge
AuthInfo=$S/run/munge
DbdHost=localhost
DbdPort=17002
SlurmUser=root
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=17003
StorageUser=slurm
StoragePass=$secret
StorageLoc=slurm
PidFile=$S/run/slurmdbd.pid
LogFile=$S/log/slurmdbd.log
END
  chmod 600 "$S/slurmdbd.conf" "$S/database.sql"
  cat >"$S/slurm.conf" <<END
ClusterName=llm4msr
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=17001
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$S/run/munge
CredType=cred/munge
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=localhost
AccountingStoragePort=17002
AccountingStoragePass=$S/run/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# torchx submits a job of N hosts as N components, which only the backfill scheduler starts.
SchedulerParameters=bf_interval=1,bf_continue,sched_interval=2
SlurmdParameters=config_overrides
SlurmdTimeout=10
KillWait=5
JobRequeue=1
ReturnToService=2
StateSaveLocation=$S/state
SlurmdSpoolDir=$S/spool-%n
SlurmctldPidFile=$S/run/slurmctld.pid
SlurmdPidFile=$S/run/slurmd-%n.pid
SlurmctldLogFile=$S/log/slurmctld.log
SlurmdLogFile=$S/log/slurmd-%n.log
NodeName=node1 NodeAddr=127.0.0.1 Port=17011 CPUs=4 RealMemory=16000
NodeName=node2 NodeAddr=127.0.0.1 Port=17012 CPUs=4 RealMemory=16000
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP
END
}

slurm_up() {
  root
  slurm_down
  needs "slurmctld slurmd slurmdbd sbatch munged mariadbd" \
    slurmctld slurmd slurmdbd slurm-client munge mariadb-server
  slurm_configure
  grep -q "$HOSTS_MARK" /etc/hosts || echo "127.0.0.1 node1 node2 $HOSTS_MARK" >>/etc/hosts
  munged --force --key-file="$S/munge.key" --socket="$S/run/munge" --pid-file="$S/run/munged.pid" \
    --log-file="$S/log/munged.log" --seed-file="$S/munge.seed"
  mariadb-install-db --user=root --datadir="$S/database" --auth-root-authentication-method=socket \
    --skip-test-db >"$S/log/database.log" 2>&1
  mariadbd --no-defaults --user=root --datadir="$S/database" --socket="$S/run/database" \
    --bind-address=127.0.0.1 --port=17003 --skip-name-resolve --pid-file="$S/run/mariadbd.pid" \
    >>"$S/log/database.log" 2>&1 &
  waits 30 mariadb --no-defaults --socket="$S/run/database" -e "SELECT 1"
  mariadb --no-defaults --socket="$S/run/database" <"$S/database.sql"
  slurmdbd
  waits 30 sacctmgr -n list cluster
  waits 15 sacctmgr -i add cluster llm4msr
  slurmctld -c
  for n in 1 2; do power_on node$n; done
  waits 30 sh -c '[ "$(sinfo -h -N -t idle | wc -l)" = 2 ]'
  sinfo
  echo "try: export SLURM_CONF=$S/slurm.conf"
}

# A node is a process namespace: when its first process is killed, the kernel ends all others.
power_on() {
  setsid unshare --pid --fork --kill-child --mount-proc slurmd -D -N "$1" \
    >"$S/log/$1.out" 2>&1 </dev/null &
  echo $! >"$S/run/$1.power"
}

power_off() { # also ends what is left of it
  [ -f "$S/run/$1.power" ] || return 0
  kill -9 "$(cat "$S/run/$1.power")" 2>/dev/null || true
  rm -f "$S/run/$1.power"
}

slurm_down() {
  [ -d "$S" ] || return 0
  power_off node1; power_off node2
  for daemon in slurmctld slurmdbd mariadbd munged; do
    local file=$S/run/$daemon.pid
    [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null && waits 10 sh -c "! kill -0 $(cat "$file")" || true
  done
  sed -i "/$HOSTS_MARK/d" /etc/hosts 2>/dev/null || # a mounted file cannot be replaced by another
    { grep -v "$HOSTS_MARK" /etc/hosts >"$S/hosts" && cat "$S/hosts" >/etc/hosts; }
  rm -rf "$S"
}

case "${1:-} ${2:-}" in
  "namespaces up") namespaces_up "${3:-}" "${4:-}" ;;
  "namespaces down") namespaces_down ;;
  "slurm up") slurm_up ;;
  "slurm fail") power_off "${3:?which node}" ;;
  "slurm mend") power_on "${3:?which node}" ;;
  "slurm down") slurm_down ;;
  *) sed -n '2,14p' "$0" | sed 's/^# \{0,1\}//'; exit 2 ;;
esac
