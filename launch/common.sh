# Shared by the launch scripts: finds a Python, makes or reuses .venv at the top of the repository. Sourced, not run.

say() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; }

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  say "no Python 3.11 to 3.13 with venv found; install one, or set PYTHON to it"
  return 1
}

# ensure_venv ROOT WANT: installs the package with the extra WANT ("" for none) unless exactly that was done before.
ensure_venv() {
  local root=$1 want=$2 python stamp wanted
  stamp="$root/.venv/.installed${want:+-$want}"
  wanted=$(cat "$root/setup.py" "$root/launch/common.sh" | cksum)
  if [ -x "$root/.venv/bin/python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    say "reusing $root/.venv"
    return
  fi
  if [ ! -x "$root/.venv/bin/python" ]; then
    python=$(find_python) || return 1
    say "making $root/.venv with $("$python" --version)"
    "$python" -m venv "$root/.venv"
  fi
  say "installing unclip_jax${want:+[$want]} (a few minutes, once)"
  "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root${want:+[$want]}"
  if [ "$want" = test ]; then
    # References for the tests. They ask for torchvision, which need not fit the torch that is there. The
    # tests use the parts that do without.
    "$root/.venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps \
      lpips==0.1.4 open-clip-torch==3.3.0 taming-transformers-rom1504==0.0.6 torch-fidelity==0.4.0 \
      dalle2-pytorch==1.15.6 rotary-embedding-torch==0.3.5
  fi
  printf '%s' "$wanted" >"$stamp"
}

# ensure_chromium: the tests of the page need a browser. Where it cannot be installed they skip and say why.
ensure_chromium() {
  local as_root=()
  if command -v chromium >/dev/null 2>&1 || ! command -v apt-get >/dev/null 2>&1; then
    return 0
  fi
  if [ "$(id -u)" != 0 ]; then
    sudo -n true 2>/dev/null || return 0
    as_root=(sudo -n)
  fi
  say "installing chromium (once)"
  if ! { "${as_root[@]}" apt-get update -q && "${as_root[@]}" apt-get install -y -q --no-install-recommends chromium; } >/dev/null 2>&1; then
    say "chromium was not installed; the tests of the page will skip"
  fi
}
