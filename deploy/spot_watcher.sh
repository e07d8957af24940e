#!/usr/bin/env bash
# Waits until AWS announces that it takes this node back, then drains the node in Ray: no new work lands on it, and
# what it loses is not counted as a failure. AWS tells two minutes ahead; Ray itself does not ask.
#
#   spot_watcher.sh HEAD_IP:PORT
#
# Ends once the node is drained. On a node that is not spot no notice ever comes. Needs wget, which Ray's images have.
set -u
head=$1
imds=${IMDS_URL:-http://169.254.169.254}
pause=${SPOT_PAUSE_SECONDS:-5}  # the rate that AWS recommends

ask() { wget -qO- -T2 -t1 "$@"; }

# IMDSv2: each answer costs a token.
notice() {
  local token
  token=$(ask --method=PUT --header='X-aws-ec2-metadata-token-ttl-seconds: 60' "$imds/latest/api/token") &&
    ask --header="X-aws-ec2-metadata-token: $token" "$imds/latest/meta-data/spot/instance-action"
}

# The id stands on the command line of this node's raylet. Left to itself, ray drain-node starts a driver to learn it.
node_id() {
  local process arguments
  for process in /proc/[0-9]*; do
    arguments=$(tr '\0' '\n' 2>/dev/null <"$process/cmdline")
    grep -qxE -e "--gcs[-_]address=$head" <<<"$arguments" && sed -n 's/^--node_id=//p' <<<"$arguments"
  done 2>/dev/null | head -n 1
}

until announced=$(notice); do sleep "$pause"; done
echo "notice: $announced"
# {"action": "terminate", "time": "2027-01-31T12:00:00Z"}
end=$(date -d "$(sed -n 's/.*"time" *: *"\([^"]*\)".*/\1/p' <<<"$announced")" +%s)

while remaining=$((end - $(date +%s))) && [ "$remaining" -gt 0 ]; do
  ray drain-node --address="$head" --node-id="$(node_id)" --reason=DRAIN_NODE_REASON_PREEMPTION \
    --reason-message="spot instance taken back" --deadline-remaining-seconds="$remaining" && exit 0
  sleep "$pause"
done
exit 1
