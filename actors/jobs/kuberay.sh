# The entry point of a RayJob, in the head's pod: the driver, and a mark that lets the workers' pods wait for its end.

started() {
  mkdir -p "${running%/*}"
  echo "$BASHPID" >"$pid_file"
  touch "$running"
}
ended() { rm -f "$running" "$pid_file"; }

trap ended EXIT
started
cd "$work"
attend rlhf run "${arguments[@]}" --address auto
exit "$status"
