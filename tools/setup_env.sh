#!/usr/bin/env bash
# Copyright 2026 The gemma_ext Authors.
# SPDX-License-Identifier: Apache-2.0
#
# Makes .venv ready: finds a Python, creates the environment, installs
# gemma_ext with the extras `samples` and `dev` at the tested versions.
#
#   bash tools/setup_env.sh [PYTHON]
#
# Safe to call again at any time: it does nothing when nothing changed, and
# starts over when an earlier call was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly STAMP=$VENV/.gemma_ext-ready
# Beside .venv, so that it outlives `venv --clear`.
readonly UNFINISHED=.venv-unfinished
readonly CONSTRAINTS=tools/constraints.txt
readonly MIN_MINOR=12
# TensorFlow, a dependency of `gemma`, comes late to new versions of Python:
# those that it surely has come first.
readonly MINORS='13 12 14'

# Neither the caller's environment nor the caller's packages leak in.
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV CONDA_PREFIX UV_PROJECT_ENVIRONMENT
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_REQUIRE_VIRTUALENV=0 PIP_USER=0

say() { printf 'setup: %s\n' "$*" >&2; }

fingerprint() {
  cat pyproject.toml "$CONSTRAINTS" tools/setup_env.sh \
    gemma_ext/kernels/cpu/* | cksum
}

# Prints every Python that may serve, best first.
candidates() {
  local minor dir pyenv=$HOME/.pyenv
  [ -z "${1:-}" ] || printf '%s\n' "$1"
  for minor in $MINORS; do
    type -aP "python3.$minor" || true
    for dir in "${PYENV_ROOT:-$pyenv}/versions/3.$minor".* \
        "$pyenv/versions/3.$minor".* \
        "$HOME/.local/share/uv/python/cpython-3.$minor"* \
        /opt/python*3."$minor"* /opt/homebrew /usr/local /usr; do
      [ ! -x "$dir/bin/python3.$minor" ] || printf '%s\n' \
        "$dir/bin/python3.$minor"
    done
  done
  type -aP python3 python || true
  for dir in /opt/*; do
    [ ! -x "$dir/bin/python3" ] || printf '%s\n' "$dir/bin/python3"
  done
}

# Whether this Python can make an environment that runs gemma_ext. A shim on
# PATH may have a fitting name and no interpreter behind it.
works() {
  "$1" -I -c "
import sys, venv, ensurepip, ssl, sqlite3, lzma, bz2, ctypes
ok = sys.version_info[0] == 3 and sys.version_info[1] >= $MIN_MINOR
sys.exit(not ok or sys.maxsize < 2**32)" >/dev/null 2>&1
}

find_python() {
  local python
  while IFS= read -r python; do
    if works "$python"; then
      printf '%s\n' "$python"
      return 0
    fi
    [ "$python" != "${1:-}" ] || say "$python is no complete Python >=3.$MIN_MINOR; looking further"
  done < <(candidates "${1:-}" | awk '!seen[$0]++')
  cat >&2 <<EOF
setup: found no Python 3.$MIN_MINOR or newer with the modules venv and ssl.
  Looked for python3.14 ... python3.$MIN_MINOR and python3 on PATH, in pyenv's
  versions, /opt, /usr/local and /usr.
  Install one, for example from python.org, with 'pyenv install 3.13', or with
  your system's package manager (on Debian also its python3-venv package),
  or name one:   make PYTHON=/path/to/python3.13 test
EOF
  return 1
}

venv_works() {
  [ -x "$VENV/bin/python" ] && works "$VENV/bin/python" \
    && "$VENV/bin/python" -I -m pip --version >/dev/null 2>&1
}

create_venv() {
  local python
  python=$(find_python "${1:-}")
  say "creating $VENV with $("$python" -V) ($python)"
  : > "$UNFINISHED"
  "$python" -I -m venv --clear "$VENV"
}

with_uv() {
  # As pip does, uv is to trust the certificates that the machine trusts, and
  # to ask the index that pip was told to ask.
  export UV_SYSTEM_CERTS=1 UV_NATIVE_TLS=1
  [ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
  [ -z "${PIP_INDEX_URL:-}" ] \
    || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
  "$VENV/bin/python" -m uv pip install --python "$VENV/bin/python" "$@"
}

with_pip() { "$VENV/bin/python" -m pip install "$@"; }

install() {
  local -a what=(-e '.[samples,dev]') tested=(-c "$CONSTRAINTS")
  "$VENV/bin/python" -m uv --version >/dev/null 2>&1 \
    || with_pip -q uv || say 'uv cannot be installed; using pip alone'
  with_uv "${what[@]}" "${tested[@]}" && return
  say 'uv did not succeed; trying pip'
  with_pip "${what[@]}" "${tested[@]}" && return
  say 'the tested versions do not fit this machine; trying the newest ones'
  with_uv "${what[@]}"
}

main() {
  if venv_works && [ -e "$STAMP" ] && [ ! -e "$UNFINISHED" ] \
      && [ "$(cat "$STAMP")" = "$(fingerprint)" ]; then
    touch "$STAMP"
    return 0
  fi
  if ! venv_works || [ -e "$UNFINISHED" ]; then
    create_venv "${1:-}"
  fi
  rm -f "$STAMP"
  : > "$UNFINISHED"
  say 'installing the packages (about 2 GB, some minutes the first time)'
  if ! install >&2; then
    say 'the packages could not be installed; the lines above say why.'
    say 'PyPI must be reachable once. Run the same command to try again.'
    return 1
  fi
  fingerprint > "$STAMP.new"
  mv "$STAMP.new" "$STAMP"
  rm -f "$UNFINISHED"
  say 'ready'
}

main "$@"
