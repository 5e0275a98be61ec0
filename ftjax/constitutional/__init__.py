"""A model that critiques, revises and compares answers by written principles, and what comes of it for training."""
