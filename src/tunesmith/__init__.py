"""tunesmith: one YAML file in, a fine-tuned open-weight LLM out, by LoRA or full-parameter training.

Importing this package loads nothing heavy: torch and transformers are imported where they are used.
"""

__version__ = "0.1.0"
