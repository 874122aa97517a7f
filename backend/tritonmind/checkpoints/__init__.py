"""Checkpoints as others write them, Hugging Face directories and GGUF files: read by `convert` and by an engine."""
