"""transformers' processors of logits, as the witness of ours."""

import numpy as np
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ftjax.sampling.sampler import Sampling


def transformers_filter(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The processors `generate` makes for these options, in its order."""
    scores = TemperatureLogitsWarper(float(sampling.temperature))(None, torch.tensor(logits))
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    return scores.numpy()
