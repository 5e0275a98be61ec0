"""ftjax.serve: fine-tuning jobs and their models behind HTTP, in the forms of OpenAI's and of Tinker's clients."""
