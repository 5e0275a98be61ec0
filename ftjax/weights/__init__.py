"""Pretrained weights in and fine-tuned weights out: safetensors, GGUF, Hugging Face and PEFT directories."""
