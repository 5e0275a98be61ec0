"""Training by single steps, as the client of Tinker asks for them."""
