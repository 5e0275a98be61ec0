"""ftjax fine-tunes open large language models in JAX. Start at `ftjax.train`; the README says how the code is laid out."""
