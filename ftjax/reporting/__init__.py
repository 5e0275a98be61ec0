"""A run, or several beside each other, as one self-contained page: did it help, and what did it cost."""
