# The entry point of a RayJob, in the head's pod: the driver, and a file that lets pods wait for its end.

trap 'rm -f "$running" "$pid_file"' EXIT
mkdir -p "${running%/*}"
touch "$running"
echo "$BASHPID" >"$pid_file"
cd "$work"
attend rlhf run "${arguments[@]}" --address auto
exit "$status"
