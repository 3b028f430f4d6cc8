# Shared by the scripts that jobs start with: a driver that is told to go, and has time to save a checkpoint.

told='' current=''

hand_on() { # a notice to go, handed on to what runs
  told=yes
  [[ -z $current ]] || kill -TERM "$current" 2>/dev/null || true
}
trap hand_on TERM USR1

attend() { # run a command to its end, whatever signals come; leaves its status in `status`, 75 where it is to go on
  status=75
  [[ -z $told ]] || return 0
  "$@" &
  current=$!
  [[ -z $told ]] || hand_on # it came in between
  while kill -0 "$current" 2>/dev/null; do
    wait "$current" || true
  done
  status=0
  wait "$current" || status=$?
  current=''
  # one that had not come so far as to handle the signal has lost nothing
  [[ -z $told || $status -ne 143 ]] || status=75
}
