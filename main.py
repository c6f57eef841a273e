"""Fine-tune as a YAML file says: ``python main.py llama-3-8b-lora.yaml``, the same as ``tunesmith finetune``."""

import sys

from tunesmith.cli import main

if __name__ == "__main__":
    sys.exit(main(["finetune", *sys.argv[1:]]))
