"""Stands in for ``smoothkd stage STAGE_ID --attempt N``: notes that it began, then does what the test wrote down.

SMOOTHKD_DATA_DIR/behaviour.json maps attempt numbers to what to do; the default is to succeed.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

folder = Path(os.environ["SMOOTHKD_DATA_DIR"])
stage_id, _, number = sys.argv[1:]
behaviours = json.loads((folder / "behaviour.json").read_text()) if (folder / "behaviour.json").exists() else {}
behaviour = behaviours.get(number, behaviours.get("*", "succeed"))

if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with (folder / "begun").open("a") as begun:
    begun.write(f"{stage_id} {number} {os.getpid()}\n")
print(f"attempt {number}", flush=True)  # noqa: T201 - this is the log

if behaviour in ("wait", "stubborn"):
    while not (folder / "go").exists():
        time.sleep(0.02)
elif behaviour == "fail":
    problem = {"reason": "invalid_dataset", "what": "row 7 has no response", "fix": "Add one."}
    Path(os.environ["SMOOTHKD_PROBLEM_FILE"]).write_text(json.dumps(problem))
    sys.exit(2)
elif behaviour == "give up":
    Path(os.environ["SMOOTHKD_PROBLEM_FILE"]).write_text('{"reason": "cancelled", "what": "stopped"}')
    sys.exit(130)
elif behaviour == "crash":
    raise RuntimeError("something broke \udcff\0".encode("utf-8", "replace").decode())
elif behaviour == "garbage":
    Path(os.environ["SMOOTHKD_PROBLEM_FILE"]).write_text("{not json")
    sys.exit(4)
elif behaviour == "die":
    os.kill(os.getpid(), signal.SIGKILL)
elif behaviour == "abort":
    os.abort()
