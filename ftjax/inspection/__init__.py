"""What `ftjax.inspect_data` shows: a survey of the rows, their tokens, in the terminal and as a page."""
