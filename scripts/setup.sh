#!/usr/bin/env bash
# Makes the toolkit ready to run and exports PYTHON, the interpreter that has the locked stack.
#
#   source scripts/setup.sh     in a launcher, from any directory
#   bash scripts/setup.sh       by hand; prints the interpreter
#
# In this order: an active environment (virtualenv or conda) that already has the locked stack; otherwise `.venv` in the
# checkout (or UV_PROJECT_ENVIRONMENT), made by uv from uv.lock for Python 3.11 or 3.12.  uv is installed with pip where
# it is missing.  A second call compares one digest and starts nothing.
#
#   TRAIN_T2I_EXTRAS="deepspeed bitsandbytes"   optional parts to install as well
set -euo pipefail

SETUP_ROOT="$(cd -P -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
SETUP_MIN_UV="0.5.0" # the first lines of uv that read dependency groups and this lock

setup_say() { printf 'setup: %s\n' "$*" >&2; }

setup_fail() {
  printf 'error: %s\n' "$1" >&2
  printf 'hint: %s\n' "$2" >&2
  return 2
}

setup_digest() { # what an environment was made from: lock, project and place
  {
    cat -- "$SETUP_ROOT/uv.lock" "$SETUP_ROOT/pyproject.toml"
    printf '%s\n' "$SETUP_ROOT"
  } | if command -v sha256sum >/dev/null 2>&1; then sha256sum; else shasum -a 256; fi | cut -d ' ' -f 1
}

setup_stamped() { # ENVIRONMENT DIGEST: was it made, whole, from this digest, with the extras that are asked for?
  local extra digest="" extras=""
  [[ -x "$1/bin/python" && -r "$1/.train_t2i_stamp" ]] || return 1
  { read -r digest && read -r extras; } <"$1/.train_t2i_stamp" || true # one that was cut off is no stamp
  [[ "$digest" == "$2" ]] || return 1
  for extra in ${TRAIN_T2I_EXTRAS:-}; do [[ " $extras " == *" $extra "* ]] || return 1; done
}

setup_has_stack() { # ENVIRONMENT: does it hold the locked version of every core package, on a Python that is supported?
  "$1/bin/python" - "$SETUP_ROOT" <<'PY' >/dev/null 2>&1
import re, sys, tomllib
from importlib.metadata import version
from pathlib import Path

assert (3, 11) <= sys.version_info[:2] <= (3, 12)
root = Path(sys.argv[1])
locked: dict[str, set[str]] = {}
for package in tomllib.loads((root / "uv.lock").read_text("utf-8"))["package"]:
    locked.setdefault(package["name"], set()).add(package.get("version", ""))
for line in tomllib.loads((root / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]:
    name = re.match(r"[A-Za-z0-9._-]+", line).group().lower().replace("_", "-")
    assert version(name).split("+")[0] in {found.split("+")[0] for found in locked[name]}, name
PY
}

setup_python() { # the first Python here that can run pip
  local candidate
  for candidate in python3 python3.12 python3.11 python; do
    if "$candidate" -m pip --version >/dev/null 2>&1; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  setup_fail "neither uv nor a Python with pip was found" "install uv (https://docs.astral.sh/uv) or python3 with pip"
}

setup_recent() { # PROGRAM: is it a uv that is new enough?
  local have
  have="$("$1" --version 2>/dev/null)" || return 1
  have="$(printf '%s\n' "$have" | cut -d ' ' -f 2)"
  [[ "$(printf '%s\n%s\n' "$SETUP_MIN_UV" "$have" | sort -V | head -n 1)" == "$SETUP_MIN_UV" ]]
}

setup_uv() { # prints a uv that works; pip puts one into a private folder where there is none
  local private python
  private="${XDG_CACHE_HOME:-${HOME:-$SETUP_ROOT/runs}/.cache}/train-t2i/uv"
  for python in uv "${HOME:-}/.local/bin/uv" "$private/bin/uv"; do
    if setup_recent "$python"; then
      printf '%s\n' "$python"
      return
    fi
  done
  python="$(setup_python)" || return 2 # errexit does not reach into $(...)
  setup_say "installing uv into $private"
  # --target works with a Python that the system manages, and touches nothing of it
  PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --disable-pip-version-check --upgrade --target "$private" "uv>=$SETUP_MIN_UV" >&2 || {
    setup_fail "pip could not install uv" "check the network, or install uv by hand (https://docs.astral.sh/uv)"
    return 2
  }
  printf '%s\n' "$private/bin/uv"
}

setup_sync() { # ENVIRONMENT DIGEST: makes it what uv.lock says
  local uv extra digest="" extras=""
  local -a options=(--frozen --project "$SETUP_ROOT")
  uv="$(setup_uv)" || return 2 # errexit is off in all that a caller asks with `if` or `||`
  [[ -t 2 ]] || options+=(--quiet)
  [[ ! -r "$1/.train_t2i_stamp" ]] || { read -r digest && read -r extras; } <"$1/.train_t2i_stamp" || true
  [[ "$digest" == "$2" ]] || extras="" # those of the same lock stay
  for extra in ${TRAIN_T2I_EXTRAS:-}; do [[ " $extras " == *" $extra "* ]] || extras="${extras:+$extras }$extra"; done
  for extra in $extras; do options+=(--extra "$extra"); done
  setup_say "making $1 from uv.lock (the first time takes minutes)"
  rm -f -- "$1/.train_t2i_stamp"
  if ! UV_PROJECT_ENVIRONMENT="$1" "$uv" sync "${options[@]}" >&2; then
    setup_say "trying once more, with the certificates of this system (UV_NATIVE_TLS, UV_SYSTEM_CERTS)"
    UV_NATIVE_TLS=1 UV_SYSTEM_CERTS=1 UV_PROJECT_ENVIRONMENT="$1" "$uv" sync "${options[@]}" >&2 || {
      setup_fail "uv could not make $1" "read its message above; a proxy or a full disk are the usual causes"
      return 2
    }
  fi
  printf '%s\n%s\n' "$2" "$extras" >"$1/.train_t2i_stamp"
}

setup_main() {
  local digest environment active
  digest="$(setup_digest)" || return 2
  environment="${UV_PROJECT_ENVIRONMENT:-.venv}"
  [[ "$environment" == /* ]] || environment="$SETUP_ROOT/$environment"
  for active in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    [[ -n "$active" && "$active" != "$environment" && -x "$active/bin/python" ]] || continue
    if setup_has_stack "$active"; then
      PYTHON="$active/bin/python"
      return
    fi
    [[ "$active" == "${VIRTUAL_ENV:-}" || "${CONDA_DEFAULT_ENV:-}" == dmdr ]] &&
      setup_say "the active environment $active lacks the locked stack; using $environment"
  done
  setup_stamped "$environment" "$digest" || setup_sync "$environment" "$digest" || return 2
  PYTHON="$environment/bin/python"
}

setup_main
[[ $? == 0 ]] || return 2 # to a caller that switched errexit off; where it is on, a failure ended all this
export PYTHON
unset PYTHONDONTWRITEBYTECODE # where it is set, every start compiles torch and its friends anew: 25 s instead of 8
# The packages are found from any directory, also where the environment has them without the project itself.
[[ ":${PYTHONPATH:-}:" == *":$SETUP_ROOT:"* ]] || export PYTHONPATH="$SETUP_ROOT${PYTHONPATH:+:$PYTHONPATH}"
[[ "${BASH_SOURCE[0]}" != "$0" ]] || printf '%s\n' "$PYTHON"
