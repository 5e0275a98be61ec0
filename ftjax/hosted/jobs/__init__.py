"""Fine-tuning jobs: requests become rows of a database, these ordinary runs in workdirs, and models come of them."""
