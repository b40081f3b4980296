#!/usr/bin/env bash
# The demo: kernel, image, daemon, and one command in a VM of its own. Every
# part is kept for next time; `agentiso down` ends the daemon.
set -euo pipefail
cd "$(dirname "$0")/.."
agentiso=bin/agentiso

$agentiso up
$agentiso kernel fetch
$agentiso image build dev
echo
echo '$ agentiso run -- python3 -c '"'"'print("hello")'"'"
$agentiso run --timings -- python3 -c 'print("hello")'
echo
echo "The daemon runs on: try 'bin/agentiso run -it -- bash'; end it with 'bin/agentiso down'."
