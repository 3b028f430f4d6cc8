# The entry point of a RayJob, in the head's pod: the driver, a file that lets pods wait for its end, and one that keeps
# KubeRay, which brings up a new cluster for any job that failed, from starting what would only fail again.

if [[ -s $ended ]]; then
  status=$(<"$ended")
  echo "rlhf: this job has ended with status $status before, and is not tried again; rlhf resubmit starts it anew" >&2
  exit "$status"
fi
trap 'rm -f "$running" "$pid_file"' EXIT
(umask 077 && mkdir -p "${running%/*}")
touch "$running"
echo "$BASHPID" >"$pid_file"
cd "$work"
attend rlhf run "${arguments[@]}" --address auto
case $status in
  2 | 3) echo "$status" >"$ended" ;; # it cannot use its recipe or data, or missed a gate; 1 may be a machine that went
esac
exit "$status"
