#!/usr/bin/env bash
# The README's two commands on a machine that has nothing but what the README names. As root, on Debian or
# Ubuntu with debootstrap (and Debian's keyring):
#
#     tools/fresh_machine.sh bookworm|trixie
#
# Makes a root of that release with the packages of the README's `apt-get install`, clones HEAD for an ordinary
# user there, and runs `make demo` and `make test`. Prints versions, times, sizes and how both ended; its status
# is 0 if both passed. The mirror, proxies, certificates and pip's settings are this machine's.
set -euo pipefail
cd "$(dirname "$0")/.."
case "$*" in bookworm | trixie) ;; *) sed -n '2,9s/^# \?//p' "tools/${0##*/}" >&2; exit 2 ;; esac
release=$1
# Mounts and processes of its own: none outlives it, however it ends.
if [ -z "${FRESH_MACHINE:-}" ]; then
  FRESH_MACHINE=1 exec unshare --mount --propagation private --pid --fork --kill-child "$PWD/tools/${0##*/}" "$release"
fi

packages=$(sed -n 's/^sudo apt-get install \([^#]*[^# ]\).*/\1/p' README.md)
work=$(mktemp -d "${TMPDIR:-/tmp}/fresh-$release-XXXXXX")
root=$work/root log=$work/log
mkdir "$root"
chmod 755 "$work"
trap 'umount -R "$root"/{proc,dev} "${folders[@]/#/$root}" 2>/dev/null || true; rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM
folders=()

# Without a Debian mirror here, on Ubuntu, debootstrap has one of its own.
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 '/debian/$' || true)
debootstrap --variant=minbase "$release" "$root" $mirror >"$log" 2>&1 || { tail "$log" >&2; exit 1; }
apt-config dump | grep '^Acquire::' >"$root/etc/apt/apt.conf.d/99machine" || true
cp /etc/resolv.conf /etc/hosts "$root/etc"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"

# pip's settings as its variables, with the folders that they name; beside an index are its files.
settings=(PIP_LOG=/home/stranger/pip.log)
mapfile -t -O 1 settings < <(env | grep -E '^(SSL_CERT_|[A-Za-z]+_(proxy|PROXY)=)')
while IFS='=' read -r key value; do
  name=${key##*.} value=${value//\\n/ }
  name=${name//-/_}
  settings+=("PIP_${name^^}=${value//\'/}")
done < <(python3 -m pip config list 2>/dev/null)
for file in $(printf '%s\n' "${settings[@]}" | sed -n 's/^PIP_CONSTRAINT=//p'); do
  install -D -m 644 "$file" "$root$file"
done
mapfile -t folders < <(printf '%s\n' "${settings[@]}" | grep -E '^PIP_(FIND_LINKS|.*INDEX_URL)=' |
  grep -oE '[= ](file://)?/[^ ]*' | sed -E 's#^[= ](file://)?##; s#/simple/?$##' | sort -u)
for folder in "${folders[@]}"; do
  mkdir -p "$root$folder"
  mount --bind -o ro "$folder" "$root$folder"
done

inside() { chroot "$root" env -i LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin "${settings[@]}" "$@"; }
{ inside apt-get update && inside env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $packages; } >"$log" 2>&1 ||
  { tail "$log" >&2; exit 1; }
# In place of those that came with Python.
mkdir -p "$root/etc/ssl/certs"
cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs"
inside useradd --create-home stranger
# Of a checkout that may be somebody else's than root's.
export GIT_CONFIG_GLOBAL=$work/gitconfig
git config --global safe.directory '*'
git clone -q . "$root/home/stranger/checkout"
inside chown -R stranger: /home/stranger
echo "== $release with $packages ($(sed -n 's/^Need to get \(.*\) of archives.*/\1/p' "$log"))"
echo "$(inside python3 --version), $(inside g++ --version | head -n 1), $(nproc) cores, commit $(git rev-parse --short HEAD)"

# What pip has fetched, by its log: from the network, or files beside an index.
fetched() {
  local log="$root/home/stranger/pip.log"
  {
    sed -nE 's/.* Downloading .*\(([0-9.]+) ?([kMG]?)B\)$/\1\U\2/p' "$log" | numfmt --from=si
    sed -nE "s#.* Processing (/.*\.(whl|tar\.gz))\$#$root\1#p" "$log" | sort -u | xargs -r stat -L -c %s
  } | awk '{ bytes += $1 } END { printf "%.2f GB", bytes / 1e9 }'
}

failed=0
try() {
  local start=$SECONDS status=0 log="$root/home/stranger/$1.log"
  : >"$root/home/stranger/pip.log"
  inside chown stranger: /home/stranger/pip.log
  inside setpriv --reuid stranger --regid stranger --init-groups env HOME=/home/stranger USER=stranger \
    make -C /home/stranger/checkout "$1" >"$log" 2>&1 || status=$?
  echo
  echo "== make $1: $((SECONDS - start)) s, status $status, fetched $(fetched), .venv $(du -sh "$root/home/stranger/checkout/.venv" | cut -f 1)"
  sed -n "/$2/,\$p" "$log"
  [ "$status" = 0 ] || { failed=1; tail -n 60 "$log"; }
}
try demo '^Loading'
try test '^=.* short test summary\|^=* not tested on'
exit $failed
