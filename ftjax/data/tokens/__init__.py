"""Conversations to token ids with masks."""
