# Shared by the scripts that jobs start with: a driver that is told to go, and has time to save a checkpoint.

told='' current=''

hand_on() { # a notice to go, handed on to what runs
  told=yes
  [[ -z $current ]] || kill -TERM "$current" 2>/dev/null || true
}
trap hand_on TERM USR1

attend() { # run a command to its end, whatever signals come; leaves its status in `status`, 75 where it is to go on
  local out words heard
  status=75
  [[ -z $told ]] || return 0
  # Bash may lose the status of what ends while a signal interrupts `wait`. So a shell that is interrupted by none runs
  # the command in its foreground, and says who it is and, in the end, how it ended.
  exec {out}>&1
  exec {words}< <(
    trap '' INT # as for all that runs in the background
    trap : TERM USR1
    code=0
    (echo "$BASHPID" && exec "$@" >&"$out" {out}>&-) || code=$?
    echo "$code"
  )
  exec {out}>&-
  hear
  current=$heard
  [[ -z $told ]] || hand_on # it came in between
  hear
  status=${heard:-137} # none: it was killed
  current=''
  exec {words}<&-
  # one that had not come so far as to handle the signal has lost nothing
  [[ -z $told || $status -ne 143 ]] || status=75
}

hear() { # the next line of `words`, in `heard`; empty at its end
  local code=130
  while ((code > 128)); do # a signal interrupted it
    code=0
    read -r -u "$words" heard || code=$?
  done
}
