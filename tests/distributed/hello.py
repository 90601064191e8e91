"""Says which process of how many this is."""

import os

print(f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']}")
if os.environ.get("FAIL"):
    raise SystemExit(3)
