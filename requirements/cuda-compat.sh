#!/usr/bin/env bash
# For the Dockerfile, as root on Debian 12: NVIDIA's forward-compatibility libcuda of CUDA 13.0, from NVIDIA's apt
# repository, into /usr/local/cuda-13.0/compat. Nothing looks there by itself: launch/node/container.sh and NVIDIA's
# container toolkit do, where the host's driver is older.
#   CUDA_REPOSITORY=https://... CUDA_KEY=FINGERPRINT requirements/cuda-compat.sh
# apt accepts only an index that the key of this fingerprint signed, and only a package whose hash is in that index.
set -euo pipefail

failed() {
  printf 'error: no cuda-compat-13-0 for %s from %s; the lines above say why.' "$architecture" "$CUDA_REPOSITORY"
  printf ' --build-arg CUDA_COMPAT=no leaves it out, for hosts with driver R580 or newer\n'
} >&2
trap failed ERR

architecture=$(dpkg --print-architecture)
case $architecture in
  amd64) folder=debian12/x86_64 ;;
  # The folder of Debian 12 for arm64 begins with a later CUDA. The package holds libraries that need glibc alone.
  arm64) folder=ubuntu2404/sbsa ;;
  *) false ;;
esac
key=/etc/apt/keyrings/nvidia-cuda.asc
source=/etc/apt/sources.list.d/nvidia-cuda.list

install -d -m 755 "${key%/*}"
/usr/lib/apt/apt-helper download-file "$CUDA_REPOSITORY/$folder/3bf863cc.pub" "$key"
chmod 644 "$key" # apt verifies as another user
echo "deb [signed-by=$key,$CUDA_KEY] $CUDA_REPOSITORY/$folder/ /" >"$source"
apt-get update
apt-get install -y --no-install-recommends cuda-compat-13-0
test -e /usr/local/cuda-13.0/compat/libcuda.so.1
# Where the container toolkit looks for it.
[ -e /usr/local/cuda ] || ln -s cuda-13.0 /usr/local/cuda
rm "$key" "$source"
apt-get clean
rm -rf /var/lib/apt/lists/* /var/log/apt /var/log/dpkg.log /var/cache/ldconfig/aux-cache
