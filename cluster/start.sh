#!/usr/bin/env bash
# Ray and an MLflow server on this machine, for real use: open to this machine alone, token authentication on.
#
#   cluster/start.sh           start what is not running yet, and say how to submit, watch and stop
#   cluster/start.sh status    say what runs
#   cluster/start.sh stop      stop what this script started, nothing else
#   cluster/start.sh --help    show these lines
#
# Set by environment variables, the same ones for all three:
#   STORAGE         runs, the tracking database and the logs of the servers (runs)
#   TRACKING_STORE  MLflow's database (a sqlite file in STORAGE); any address that MLflow takes
#   CPUS            CPUs that Ray gives out (this machine's)
#   RAY_PORT, DASHBOARD_PORT, CLIENT_PORT, MLFLOW_PORT   (6379, 8265, 10001, 5000)
#   AGENT_PORT      of the agent that runs Ray's jobs; nobody calls it by hand (the first free one from 52365 on)
set -euo pipefail
umask 077 # tokens, logs and databases are nobody else's

HOST=127.0.0.1
STORAGE=$(realpath --canonicalize-missing "${STORAGE:-runs}")
STATE=$STORAGE/.servers
CPUS=${CPUS:-$(nproc)}
RAY_PORT=${RAY_PORT:-6379}
DASHBOARD_PORT=${DASHBOARD_PORT:-8265}
CLIENT_PORT=${CLIENT_PORT:-10001}
MLFLOW_PORT=${MLFLOW_PORT:-5000}
TRACKING_STORE=${TRACKING_STORE:-sqlite:///$STORAGE/mlflow.db}
TOKEN=${RAY_AUTH_TOKEN_PATH:-$HOME/.ray/auth_token}
PROJECT=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
SELF=$(printf '%q' "$0") # as it was called, for commands that can be pasted

unset RAY_ADDRESS RAY_API_SERVER_ADDRESS # of some other cluster
export RAY_AUTH_MODE=token
export RAY_USAGE_STATS_ENABLED=${RAY_USAGE_STATS_ENABLED:-0}
# Ray's own 15 leaves a worker next to busy processes of other programs 3 % of a core.
export RAY_worker_niceness=${RAY_worker_niceness:-0}
export MLFLOW_DISABLE_TELEMETRY=${MLFLOW_DISABLE_TELEMETRY:-true}
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
# Ray takes 127.0.0.1 for the address of the network otherwise, and listens there.
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
# How long a stopped job may take to end its run in order before it is killed; Ray's own 3 s are too short.
export RAY_JOB_STOP_WAIT_TIME_S=${RAY_JOB_STOP_WAIT_TIME_S:-60}
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # nothing here serves requests that would have to end first

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() { printf '%s\n' "$*" >&2; }

# The command as the project's own environment has it, else as the caller's does.
find_command() {
  if [ -x "$PROJECT/.venv/bin/$1" ]; then
    printf '%s\n' "$PROJECT/.venv/bin/$1"
  else
    command -v "$1" || fail "$1 is not installed here: neither $PROJECT/.venv/bin/$1 nor on PATH; run make setup in $PROJECT, or activate the environment that has finhpc."
  fi
}

# Whether the server of that name, started by this script, still runs. A process id may have been given anew,
# so the process must have been started when it was written down.
running() {
  local pid started
  [ -r "$STATE/$1.pid" ] && read -r pid started <"$STATE/$1.pid" && [ -n "$started" ] && [ "$(started_at "$pid")" = "$started" ]
}

started_at() { awk '{ sub(/.*\) /, ""); print $20 }' "/proc/$1/stat" 2>/dev/null || true; }

port_free() { ! (exec 3<>"/dev/tcp/$HOST/$1") 2>/dev/null; }

need_port() { # variable, what for
  local port=${!1} next=$((${!1} + 1))
  port_free "$port" && return
  until port_free "$next"; do next=$((next + 1)); done
  fail "port $port, for $2, is in use by $(holder "$port"); choose another: $1=$next $SELF"
}

# Which program listens on a port, as far as this user may see it.
holder() {
  local inode file pid
  inode=$(awk -v port="$(printf '%04X' "$1")" '$4 == "0A" && $2 ~ ":" port "$" { print $10; exit }' /proc/net/tcp /proc/net/tcp6 2>/dev/null || true)
  file=$(find /proc/[0-9]*/fd -lname "socket:\[${inode:-none}\]" -print -quit 2>/dev/null || true)
  pid=${file#/proc/} pid=${pid%%/*}
  if [ -z "$pid" ]; then
    printf 'another program\n'
  elif tr '\0' ' ' <"/proc/$pid/cmdline" | grep --quiet --ignore-case -e /ray/ -e '^ray' -e raylet; then
    printf 'another Ray (process %s), such as that of a finhpc command that runs now\n' "$pid"
  else
    printf 'process %s (%s)\n' "$pid" "$(tr '\0' ' ' <"/proc/$pid/cmdline" | cut -c 1-80 | sed 's/ *$//')"
  fi
}

# Before anything starts: every port that what does not run yet will need.
need_ports() {
  local port
  if ! running ray; then
    need_port RAY_PORT "Ray"
    need_port DASHBOARD_PORT "Ray's dashboard and jobs"
    need_port CLIENT_PORT "Ray's clients"
    if [ -n "${AGENT_PORT:-}" ]; then
      need_port AGENT_PORT "the agent that runs Ray's jobs"
    else # every Ray of this machine takes 52365 first, that of a running finhpc command too
      port=52365
      until port_free "$port"; do port=$((port + 1)); done
      AGENT_PORT=$port
    fi
  fi
  running mlflow || need_port MLFLOW_PORT "MLflow"
}

# Run a server of that name in the background, in a session of its own: Ctrl-C here does not reach it.
launch() {
  local name=$1 pid
  shift
  setsid "$@" >>"$STATE/$name.log" 2>&1 </dev/null &
  pid=$!
  printf '%s %s\n' "$pid" "$(started_at "$pid")" >"$STATE/$name.pid"
  STARTED="$name $STARTED"
}

# Wait until a check succeeds. Arguments: name of the server, seconds, the check.
await() {
  local name=$1 deadline=$((SECONDS + $2))
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ! running "$name"; then
      tail -n 20 "$STATE/$name.log" >&2
      fail "$name ended while starting; its last lines are above, all of them in $STATE/$name.log."
    fi
    [ "$SECONDS" -lt "$deadline" ] || fail "$name does not answer; see $STATE/$name.log."
    sleep 0.5
  done
}

answers() { ! port_free "$1"; }

start_ray() {
  local ray=$1
  say "starting Ray on $CPUS CPUs"
  if [ -z "${RAY_AUTH_TOKEN:-}" ]; then
    [ -s "$TOKEN" ] || "$ray" get-auth-token --generate >/dev/null
    chmod 600 "$TOKEN"
  fi
  launch ray "$ray" start --head --block --node-ip-address "$HOST" --port "$RAY_PORT" --num-cpus "$CPUS" \
    --dashboard-host "$HOST" --dashboard-port "$DASHBOARD_PORT" --dashboard-agent-listen-port "$AGENT_PORT" \
    --ray-client-server-port "$CLIENT_PORT" --min-worker-port 0 --max-worker-port 0 \
    --temp-dir "/tmp/ray-$(id -u)-$RAY_PORT"
  # Jobs can be run some seconds after the dashboard answers: one that does nothing shows it.
  await ray 120 "$ray" job submit --address "http://$HOST:$DASHBOARD_PORT" --no-wait -- true
}

start_mlflow() {
  local mlflow=$1
  say "starting MLflow over ${TRACKING_STORE/:*@/:***@}"
  launch mlflow env "MLFLOW_BACKEND_STORE_URI=$TRACKING_STORE" "$mlflow" server --host "$HOST" --port "$MLFLOW_PORT" \
    --workers 1 --artifacts-destination "$STORAGE/mlartifacts" --uvicorn-opts "--log-level warning"
  await mlflow 120 answers "$MLFLOW_PORT"
}

explain() {
  cat <<TEXT

Ray    http://$HOST:$DASHBOARD_PORT   its token: $TOKEN (readable by you alone)
MLflow http://$HOST:$MLFLOW_PORT
runs   $STORAGE

In a shell from which you submit:

  export RAY_AUTH_MODE=token RAY_API_SERVER_ADDRESS=http://$HOST:$DASHBOARD_PORT

  submit   ray job submit --working-dir . -- python jobs/pretrain.py --config gpt2-small-cpu --data.shards /path/to/shards \\
             --run.storage $(printf '%q' "$STORAGE") --run.tracking_uri http://$HOST:$MLFLOW_PORT
  watch    ray job list; ray job logs --follow ID; ray job status ID
  stop     ray job stop ID     (the same submission goes on from its newest checkpoint)

Stop the servers: $SELF stop
TEXT
}

start() {
  local ray mlflow
  ray=$(find_command ray)
  mlflow=$(find_command mlflow)
  mkdir -p "$STATE"
  exec 9>"$STATE/lock" # two starts at once: the second finds what the first has started
  flock 9
  need_ports
  trap undo EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM HUP
  if running ray; then say "Ray runs already"; else start_ray "$ray" 9>&-; fi
  if running mlflow; then say "MLflow runs already"; else start_mlflow "$mlflow" 9>&-; fi
  STARTED=
  explain
}

# A start that did not come to its end leaves nothing running: what it had started is stopped again.
undo() {
  local code=$? name
  trap '' INT TERM HUP
  for name in $STARTED; do
    stop_one "$name"
    say "$name, which this start had begun, is stopped again"
  done
  exit "$code"
}

stop() {
  local name
  for name in mlflow ray; do
    if running "$name"; then
      stop_one "$name"
      say "$name is stopped"
    else
      say "$name does not run"
    fi
  done
}

stop_one() {
  local pid
  read -r pid _ <"$STATE/$1.pid"
  end "$pid"
  rm -f "$STATE/$1.pid"
}

# Ask a server's whole family to end, its own process first; what is left after 15 s is killed.
end() {
  local pid=$1 deadline=$((SECONDS + 15)) members
  members=$(family "$pid")
  kill -TERM "$pid" 2>/dev/null || true
  while [ "$SECONDS" -lt "$deadline" ] && alive "$members"; do sleep 0.2; done
  # shellcheck disable=SC2086 # one word a process
  kill -KILL $members 2>/dev/null || true
  deadline=$((SECONDS + 5))
  while [ "$SECONDS" -lt "$deadline" ] && alive "$members"; do sleep 0.1; done
}

# A process and all that come from it, one a line.
family() {
  { cat /proc/[0-9]*/stat 2>/dev/null || true; } | awk -v root="$1" '
    { pid = $1; sub(/.*\) /, ""); parent[pid] = $2 }
    END {
      for (pid in parent) {
        for (up = pid; up > 1 && up != root; up = parent[up]) {}
        if (up == root) print pid
      }
    }'
}

alive() {
  # shellcheck disable=SC2086 # one word a process
  kill -0 $1 2>/dev/null
}

status() {
  local name all=0
  for name in ray mlflow; do
    if running "$name"; then say "$name runs"; else say "$name does not run" && all=1; fi
  done
  [ "$all" = 1 ] || explain
  return "$all"
}

STARTED= # the servers that this call has started, the newest first
[ $# -le 1 ] || fail "$(basename "$0") takes one command, not $#: $*; use $SELF [start | status | stop]."
case "${1:-start}" in
start | stop | status) "${1:-start}" ;;
-h | --help | help) awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "$0" ;;
*) fail "$1 is not a command; use $SELF [start | status | stop]." ;;
esac
