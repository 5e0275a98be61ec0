"""What is wrong with the rows."""
