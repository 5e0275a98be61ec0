"""What `ftjax.label` does: pairs of answers, the most informative first, and what people say of them."""
