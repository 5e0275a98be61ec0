"""ftjax fine-tunes open large language models in JAX. Start reading at `ftjax.train`."""
