#!/usr/bin/env bash
# optuna 2.10.1 (the newest that hydra-optuna-sweeper 1.3.0 admits) accepts SQLAlchemy 2 at installation. Every
# storage of a study in a database then ends in a bare AssertionError without a word of explanation.
# Seen on Python 3.11, optuna 2.10.1, SQLAlchemy 2.1.9, alembic 1.20.1: "AssertionError ''".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet optuna==2.10.1 SQLAlchemy==2.1.9 alembic==1.20.1
"$folder/venv/bin/pip" check
STUDY="sqlite:///$folder/study.db" "$folder/venv/bin/python" - <<'PYTHON'
import os

import optuna

try:
    optuna.create_study(storage=os.environ["STUDY"])
except AssertionError as error:
    print(f"AssertionError {str(error)!r}")
    if str(error):
        raise SystemExit("changed: the error has a message") from error
else:
    raise SystemExit("changed: a study can be stored in SQLite with these versions")
PYTHON
