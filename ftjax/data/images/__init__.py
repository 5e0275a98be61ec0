"""Images of conversations: which there are, how a model's processor cuts them into patches, and the text for them."""
