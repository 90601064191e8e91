#!/usr/bin/env bash
# An exception that a callback of Hydra raises is turned into a warning: a callback cannot keep a run or a sweep from
# starting, and a program whose every callback failed ends with status 0.
# Seen on Python 3.11, hydra-core 1.3.8: on_run_start and on_multirun_start raise ValueError, the job runs, status 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet hydra-core==1.3.8
cd "$folder"
cat >job.py <<'PYTHON'
import hydra
from hydra.experimental.callback import Callback


class Guard(Callback):
    def on_run_start(self, config, **_):
        raise ValueError("this run must not start")

    def on_multirun_start(self, config, **_):
        raise ValueError("this sweep must not start")


@hydra.main(version_base=None, config_path=None)
def main(config):
    print(f"the job ran: {config}")


main()
PYTHON
for mode in "" --multirun; do
    venv/bin/python job.py $mode +hydra.callbacks.guard._target_=__main__.Guard +x=1 >seen 2>&1 && status=0 || status=$?
    echo "python job.py $mode: status $status"
    cat seen
    if [ "$status" -ne 0 ] || ! grep -q "the job ran" seen || ! grep -q "UserWarning: Callback Guard.on_" seen; then
        echo "changed: an error in a callback is no longer just a warning"
        exit 1
    fi
done
