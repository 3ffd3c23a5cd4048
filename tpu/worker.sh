#!/usr/bin/env bash
# What tpu/pod.sh setup runs on every worker, in its home folder: mounts the shared folder, installs the checkout.
#
#   bash adaptive/tpu/worker.sh SHARE MOUNT
#
# SHARE is gs://bucket (Cloud Storage FUSE) or address:/path (NFS, such as Filestore).
set -euo pipefail

GCSFUSE_RELEASES=https://github.com/GoogleCloudPlatform/gcsfuse/releases/download

share=$1
mount=$2

if ! mountpoint --quiet "$mount"; then
  sudo mkdir -p "$mount"
  case $share in
    gs://*)
      if ! command -v gcsfuse > /dev/null; then
        version=${GCSFUSE_VERSION:-2.7.0}
        curl -fsSL -o gcsfuse.deb "$GCSFUSE_RELEASES/v$version/gcsfuse_${version}_amd64.deb"
        sudo apt-get install --yes --quiet ./gcsfuse.deb
      fi
      sudo chown "$USER" "$mount"
      # A checkpoint is finished by renaming its folder.
      gcsfuse --implicit-dirs --rename-dir-limit=1000000 "${share#gs://}" "$mount" ;;
    *:/*)
      sudo apt-get install --yes --quiet nfs-common
      sudo mount -t nfs "$share" "$mount"
      sudo chmod a+rwx "$mount" ;;
    *)
      echo "error: SHARE=$share is neither gs://bucket nor address:/path" >&2
      exit 2 ;;
  esac
fi

# The image's own Python is older than 3.11, so uv brings one.
python3 -m pip install --quiet --user uv
cd adaptive
[[ -x .venv/bin/python ]] || python3 -m uv venv --quiet --python 3.12
python3 -m uv pip install --quiet -c constraints.txt -e '.[tpu]'
