"""The page for people, and what only it asks for."""
