"""Hugging Face directories: safetensors, configs, model cards."""
