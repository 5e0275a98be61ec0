"""Rows to conversations and pairs, and back."""
