#!/usr/bin/env bash
# A real cluster on this machine, through the same commands as in the cloud: `ray up` over SSH to a
# head and a worker (sshd on 127.0.0.2 and 127.0.0.3), `ray exec`, `ray submit` of a small search,
# `ray job submit`, `ray down`, and `--resume` of the search without the cluster.
#
#   sudo PATH="$PATH" deploy/try_local_cluster.sh
#
# Needs Linux, root, sshd, rsync, ip (apt-get install openssh-server rsync iproute2), and this project
# in the Python that is first in PATH. Takes about 3 minutes on 2 cores and prints what
# docs/cluster.md shows.
#
# Touches nothing of yours: it runs in process, network and mount namespaces of its own (its sshd
# and ports cannot be seen from outside, `ray stop` finds no other Ray, and when it ends the kernel
# ends all that it started), with its own key, sshd configuration, home and storage below a
# temporary folder.
set -euo pipefail
repository="$(cd "$(dirname "$0")/.." && pwd)"

if [ "${1:-}" != --inside ]; then
  [ "$(id -u)" = 0 ] || { echo "error: needs root, for namespaces and an sshd of its own: sudo PATH=\"\$PATH\" $0" >&2; exit 2; }
  for program in unshare sshd ssh rsync ip ray python; do
    command -v "$program" >/dev/null || [ -x "/usr/sbin/$program" ] || {
      echo "error: $program is not in PATH; apt-get install openssh-server rsync iproute2, and activate the environment of this project" >&2
      exit 2
    }
  done
  work="$(mktemp -d /tmp/repmtl_ray_try.XXXXXX)"
  trap 'rm -rf "$work"' EXIT
  unshare --pid --mount --net --fork --kill-child --mount-proc "$0" --inside "$work"
  exit
fi

work="$2"
ip link set lo up
mkdir -p /tmp/ray /run/sshd "$work/home" "$work/laptop" "$work/storage" "$work/tmp"
mount -t tmpfs tmpfs /tmp/ray # Ray keeps its own state of clusters there
controls="/tmp/ray_ssh_$(printf %s "$(id -un)" | sha256sum | cut -c1-10)" # and its SSH sockets here
mkdir -p "$controls"
mount -t tmpfs tmpfs "$controls"
chmod 700 "$work" "$work/home"
touch "$work/home/.bashrc"

# --- an sshd for "machines" 127.0.0.2 to 127.0.0.4, with keys of its own
ssh-keygen -q -t ed25519 -N "" -f "$work/host_key"
ssh-keygen -q -t ed25519 -N "" -f "$work/user_key"
cp "$work/user_key.pub" "$work/authorized_keys"
cat > "$work/sshd_config" <<END
Port 22
ListenAddress 127.0.0.2
ListenAddress 127.0.0.3
ListenAddress 127.0.0.4
HostKey $work/host_key
AuthorizedKeysFile $work/authorized_keys
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
MaxStartups 100
SetEnv HOME=$work/home
END
# The head's key lies in its home, which ssh looks up elsewhere than in HOME.
echo "IdentityFile $work/user_key" > "$work/ssh_config"
mount --bind "$work/ssh_config" /etc/ssh/ssh_config
/usr/sbin/sshd -D -f "$work/sshd_config" -E "$work/sshd.log" &

# --- the cluster file: ray_cluster.yaml's mounts, exclusions and environment, on these addresses
export HOME="$work/laptop" TMPDIR="$work/tmp" RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=disabled PYTHONWARNINGS=ignore
unset RAY_ADDRESS
python - "$repository" "$work" "$(dirname "$(command -v ray)")" <<'END'
import sys
from pathlib import Path

import yaml

repository, work, programs = sys.argv[1:]
cluster = yaml.safe_load((Path(repository) / "ray_cluster.yaml").read_text())
environment, sourced = cluster["setup_commands"][:2]
environment = environment.replace("s3://CHANGE-ME/repmtl_ray", f"{work}/storage")
environment = environment.replace("$HOME/venv/bin", programs)
here = "--node-ip-address=$(echo $SSH_CONNECTION | cut -d' ' -f3)"
local = {
    "cluster_name": "try-local",
    # Ray counts the head among a local cluster's workers, so one address is spare.
    "provider": {
        "type": "local",
        "head_ip": "127.0.0.2",
        "worker_ips": ["127.0.0.3", "127.0.0.4"],
    },
    "min_workers": 2,
    "max_workers": 2,
    "auth": {"ssh_user": "root", "ssh_private_key": f"{work}/user_key"},
    "file_mounts": {f"{work}/home/repmtl_ray": repository},
    "rsync_exclude": cluster["rsync_exclude"],
    "rsync_filter": cluster["rsync_filter"],
    "setup_commands": [
        environment,
        # in place of the installation: the sources that were brought along, this Python's packages
        f"echo export PYTHONPATH={work}/home/repmtl_ray OMP_NUM_THREADS=1 RAY_ADDRESS=auto >> ~/.repmtl_ray",
        sourced,
    ],
    "head_start_ray_commands": [
        "ray stop",
        f"ray start --head --port=6379 {here} --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml "
        "--dashboard-host=127.0.0.2",
    ],
    # No `ray stop`: on one machine it would stop the head.
    "worker_start_ray_commands": [
        f"ray start --address=$RAY_HEAD_IP:6379 {here} --num-cpus=2 --object-store-memory=300000000"
    ],
}
Path(work, "cluster.yaml").write_text(yaml.safe_dump(local))
END

say() { printf '\n[%4d s] $ %s\n' "$SECONDS" "$*"; }
noise='^[[:space:]]*$|job control|terminal process|closed\.|known hosts|node_provider.py|network_util.cc|cached provider|no-config-cache|WARNING'
run() { say "$@"; "$@" 2>&1 | sed -u 's/\x1b\[[0-9;]*m//g' | { grep --line-buffered -v -E "$noise" || true; }; }
pretty=(--log-style pretty --log-color false)
file="$work/cluster.yaml"
cd "$repository"
SECONDS=0
run ray up --yes --no-config-cache "${pretty[@]}" "$file"
say "(waiting for the worker)"
for _ in $(seq 60); do
  ray exec "$file" 'ray status' 2>/dev/null > "$work/status" || true
  grep -q '/2.0 CPU' "$work/status" && break
  sleep 2
done
run ray exec "${pretty[@]}" "$file" 'ray status'
run ray submit "${pretty[@]}" "$file" pipelines/tune_cityscapes.py -- --name first \
  --storage "$work/storage" --out "$work/home/results" --samples 3 --epochs 2 --num-train 32 --num-val 16
run ray job submit --address http://127.0.0.2:8265 -- bash -c \
  "cd $work/home/repmtl_ray && python pipelines/train.py $work/home/results/best.json --set epochs=1 --storage $work/storage"
run ray down --yes "${pretty[@]}" "$file"
say "(Ray processes that are left: $(pgrep -c -f 'raylet|gcs_server' || true))"
# Another machine: another home, no scenes, no cluster; the storage and the search's name suffice.
export RAY_ADDRESS=local PYTHONPATH="$repository" REPMTL_RAY_CACHE="$work/other_cache"
run python pipelines/tune_cityscapes.py --resume first \
  --storage "$work/storage" --out "$work/laptop/results" --samples 3 --epochs 2 --num-train 32 --num-val 16
say "(done)"
