# The batch shell of a job, on the first node: a Ray cluster over the allocation, then the driver. Ray has ended on every
# node when this shell ends, whatever happens.

stopped='' cluster='' watching=''
state="$folder/.slurm-$SLURM_JOB_ID" # on the file system that all nodes share
ray_log="$folder/$job.ray.log"

prepare() { # what the site asks for; modules and environments read what may not be set
  set +u
  setup
  set -u
}

node() { # what runs on each node: one of Ray's, in a session that Slurm's signals do not reach, until it is told to end
  local own=127.0.0.1 ports
  ray='' temporary="/tmp/rlhf-$SLURM_JOB_ID-$SLURM_NODEID"
  trap leave EXIT
  # Slurm's own notices come as these; the script's end does not, so that Ray lives until the driver has saved
  trap 'touch "$state/told"' TERM INT
  trap 'exit 143' USR2
  prepare
  rm -rf "$temporary"
  mkdir -m 700 "$temporary"
  # ports that the system chooses, so that no two jobs on a node want the same
  ports=(--node-manager-port=0 --object-manager-port=0 --min-worker-port=0 --max-worker-port=0 --metrics-export-port=0
    --dashboard-agent-listen-port=0 --dashboard-agent-grpc-port=0 --runtime-env-agent-port=0)
  if ((SLURM_NODEID == 0)); then
    ((nodes == 1)) || own=$(python -m actors.nodes address "$second_host")
    ports+=(--ray-client-server-port="$(python -m actors.nodes port)") # the one that Ray wants to be told
    setsid ray start --head --block --disable-usage-stats --include-dashboard=false --port=0 --node-ip-address="$own" \
      --temp-dir="$temporary" "${ports[@]}" "${resources[@]}" &
    ray=$!
    soon test -s "$temporary/ray_current_cluster"
    cp "$temporary/ray_current_cluster" "$state/address.part"
    mv "$state/address.part" "$state/address" # whole, or not there
  else
    own=$(python -m actors.nodes address "$first_host")
    soon test -s "$state/address"
    setsid ray start --block --disable-usage-stats --address="$(<"$state/address")" --node-ip-address="$own" \
      --temp-dir="$temporary" "${ports[@]}" "${resources[@]}" &
    ray=$!
  fi
  until gone "$ray"; do wait "$ray" || true; done
  exit 1 # nobody asked it to
}

soon() { # wait until a command succeeds, as long as a cluster may take to start and Ray has not ended
  until "$@"; do
    ((SECONDS < start_seconds)) || exit 1
    [[ -z $ray ]] || kill -0 "$ray" 2>/dev/null || exit 1
    sleep 0.5
  done
}

family() { # the processes under one
  local child
  for child in $(pgrep -P "$1"); do
    family "$child"
    echo "$child"
  done
}

leave() { # end this node's Ray: what it started is listed before, since some of that outlives it
  local left
  trap '' TERM INT USR2
  if [[ -n $ray ]]; then
    mapfile -t left < <(family "$ray")
    kill -TERM "$ray" 2>/dev/null || true
    within 15 gone "$ray" || kill -KILL "$ray" 2>/dev/null || true
    kill -KILL "${left[@]}" 2>/dev/null || true
  fi
  rm -rf "$temporary"
}

gone() { ! kill -0 "$1" 2>/dev/null; }

within() { # wait so many seconds until a command succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    ((SECONDS < end)) || return 1
    sleep 0.1
  done
}

watch() { # for a notice that Slurm gave to the nodes alone, as it does when it preempts
  until [[ -e $state/told ]]; do sleep 0.5; done
  kill -TERM $$
}

finish() { # end Ray on every node: srun hands the signal on to its tasks
  trap '' TERM USR1 INT
  [[ -z $watching ]] || kill -TERM "$watching" 2>/dev/null || true
  if [[ -n $cluster ]]; then
    kill -USR2 "$cluster" 2>/dev/null || true
    within 30 gone "$cluster" || kill -KILL "$cluster" 2>/dev/null || true
    cluster=''
  fi
  rm -rf "$state"
}
trap finish EXIT

stop() { # `rlhf stop`: as a preemption, and not to be started again
  stopped=yes
  hand_on
}
trap stop INT

cd "$work"
prepare
rm -rf "$state" # of the same job, started before
mkdir -p "$folder"
mkdir -m 700 "$state"
(umask 077 && head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' >"$state/token")
unset RAY_AUTH_TOKEN RAY_ADDRESS
several=$((nodes > 1)) # else Ray stays on loopback
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$state/token" RAY_USAGE_STATS_ENABLED=0
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="$several"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
first_host=${hosts[0]} second_host=${hosts[1]:-}

parts=$(declare -p nodes state first_host second_host start_seconds resources)
parts+=$'\n'$(declare -f setup prepare node soon family leave gone within)
srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="$cpus" --kill-on-bad-exit=1 --export=ALL \
  bash -c "set -euo pipefail"$'\n'"$parts"$'\n'node >>"$ray_log" 2>&1 &
cluster=$!
watch &
watching=$!

attend python -m actors.nodes join "$state/address" "$nodes" "$start_seconds" "$cluster"
if ((status == 0)); then
  attend rlhf run "${arguments[@]}" --address "$(<"$state/address")"
elif [[ -z $told ]]; then
  echo "rlhf: Ray did not start on $nodes node(s); $ray_log ends with:" >&2
  tail -n 20 "$ray_log" >&2
fi
finish
if [[ -n $stopped ]]; then
  ((status != 75)) || status=76 # which no driver ends with: it was asked to
elif ((status == 75)); then
  echo "rlhf: told to go; the job is queued again, and continues from its checkpoint"
  scontrol requeue "$SLURM_JOB_ID" || echo "rlhf: it could not be queued again; rlhf resubmit $job" >&2
fi
exit "$status"
