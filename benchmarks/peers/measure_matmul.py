"""``python measure_matmul.py CONFIG.json TOKENS THREADS`` prints the FLOPs a second of this machine's torch.mm."""

import json
import sys
from pathlib import Path

from flops import matmul_rate, weights_of

if __name__ == "__main__":
    config = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(matmul_rate(weights_of(config), int(sys.argv[2]), int(sys.argv[3])))
