"""Text from a decoder: how the next token is chosen, and the loop that generates many."""
