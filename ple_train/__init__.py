"""The trainer: pairs on disk in, a LoRA adapter (or a full model) out. It never samples and never scores."""
