"""Measuring a model: loss on held-out rows, and scores of tasks."""
