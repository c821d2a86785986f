"""A training of twelve steps under torchrun: one rank kills itself once, or waits to be ended.

torchrun --max-restarts 1 script.py RUNS kill
"""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist
from faults.training import SETUPS, Fault, Now, Training

import fxzero

root, what = Path(sys.argv[1]), sys.argv[2]
first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
Now.fault = Fault("kill", at="backward", step=7) if what == "kill" and first else None
training = Training("zero 3")
assert SETUPS["zero 3"].ranks == dist.get_world_size()
done = training.load(root)
with fxzero.checkpoint.leaving() as leaving:
    for number in range(done + 1, 13):
        loss = training.step(number)
        with (root / f"losses {dist.get_rank()}").open("a") as file:
            file.write(json.dumps([number, loss]) + "\n")
        time.sleep(0.2 if what == "terminate" else 0)
        if leaving.asked() or number % 3 == 0:
            training.save(root, number)
        if leaving.decided:
            break
