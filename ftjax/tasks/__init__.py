"""Tasks: each module gives examples and a score, and serves training, evaluation and reinforcement learning alike."""
