#!/bin/sh
# Makes the virtual environment and installs graphopt into it: scripts/setup.sh VENV EXTRAS [PACKAGE ...]
# May be run again at any time: what is there already is kept, and pip goes on where it was cut off.
#   TORCH=auto    a GPU is there: as cuda; else a CPU build, else a torch of this Python, else stop
#   TORCH=cpu     the CPU build (no CUDA libraries), from the package indexes that pip knows
#   TORCH=cuda    the build that the package index gives by default; on x86-64 it brings CUDA, gigabytes
#   TORCH=system  the torch that this Python has already, in a virtual environment or not; what lies
#                 beside it is used too, and torch is not installed
#   PIP_ARGS=...  words for every call of pip: an index, a proxy, a folder of wheels
#   PYTHON=...    which Python; 3.11 or newer
#   EDITABLE=     installs a copy; otherwise the code is used where it lies
set -eu
venv=$1 extras=$2
shift 2
torch=${TORCH:-auto}
pip_args=${PIP_ARGS:-}
range='torch>=2.13,<2.14' cpu_build='torch==2.13.0+cpu' # as in pyproject.toml

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

is_usable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
find_python() {
    for each in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if is_usable "$each"; then command -v "$each"; return; fi
    done
}
has_gpu() { [ -e /dev/nvidia0 ] || nvidia-smi -L >/dev/null 2>&1; }
has_torch() { "$1" -c 'import importlib.metadata as m; exit(not m.version("torch").startswith("2.13."))' 2>/dev/null; }
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" $pip_args; }

clear_venv() { # nothing but what a virtual environment left: VENV may be a mistake, as /usr/local is
    if [ -e "$venv" ] && [ ! -e "$venv/pyvenv.cfg" ] && ! rmdir "$venv" 2>/dev/null; then
        fail "$venv is there and is no virtual environment: name another folder, or remove it"
    fi
    rm -rf "$venv"
}

make_venv() {
    python=$(find_python)
    [ "$torch" = system ] && options=--system-site-packages || options=
    if [ -n "$python" ] && "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        "$python" -m venv $options "$venv"
    elif command -v uv >/dev/null; then
        say "no Python 3.11 with venv; uv makes the environment"
        uv venv --quiet --seed $options --python "${python:-3.12}" "$venv"
    elif [ -n "$python" ]; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        fail "$python cannot make virtual environments. On Debian and Ubuntu: apt install python$version-venv; or install uv"
    else
        fail "Python 3.11 or newer is needed. On Debian 12 and Ubuntu 24.04: apt install python3 python3-venv; or install uv"
    fi
    [ "$torch" != system ] || show_torch "$python"
}

show_torch() { # an environment made from another one does not see what is installed in that one
    if has_torch "$venv/bin/python" || ! has_torch "$1"; then return; fi
    "$1" -c 'import importlib.util as u, pathlib as p; print(p.Path(u.find_spec("torch").origin).parents[1])' >"$venv/torch"
    mv "$venv/torch" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch-of-system.pth"
}

choose_torch() { # sets `wanted`; may turn auto into system before the environment is made
    wanted=$range
    case $torch in
        cuda | system) return ;;
        auto) if has_gpu || [ "$(uname -sm)" != "Linux x86_64" ]; then return; fi ;;
        cpu) if [ "$(uname -sm)" != "Linux x86_64" ]; then return; fi ;; # elsewhere the default is one
    esac
    has_torch "$venv/bin/python" && return
    # Asking by its full version is the only way to tell pip which build is meant.
    if refusal=$(pip install --quiet --dry-run --no-deps --no-input "$cpu_build" 2>&1); then
        wanted=$cpu_build
    elif [ "$torch" = auto ] && has_torch "$(find_python)"; then
        say "reusing the torch of $(find_python)"
        torch=system
        clear_venv
        make_venv
    else
        echo "$refusal" | grep -v '^WARNING' | tail -n 2 >&2
        fail "no GPU is here, and pip found no CPU build of torch ($cpu_build): its words are above. Either
  name an index that has it:  PIP_ARGS='--extra-index-url URL'  (the installation page of PyTorch names one; 0.2 GB)
  or take the build with CUDA:  TORCH=cuda  (about 3 GB)"
    fi
}

case $torch in auto | cpu | cuda | system) ;; *) fail "TORCH=$torch is none of auto, cpu, cuda, system" ;; esac
is_made() { [ -e "$venv/pyvenv.cfg" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }
is_made || { clear_venv; make_venv; }
choose_torch
if [ "$torch" = system ] && ! has_torch "$venv/bin/python"; then
    python=$(find_python)
    has_torch "${python:-false}" || fail "TORCH=system: ${python:-no Python} has no torch 2.13. Install one into it, name
  another Python that has one:  PYTHON=/path/of/python3,  or leave TORCH out"
    clear_venv # made without it, earlier
    make_venv
fi
say "installing graphopt with $wanted into $venv"
pip install --quiet --progress-bar off ${EDITABLE---editable} ".${extras:+[$extras]}" "$wanted" "$@"
