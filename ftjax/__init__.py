"""ftjax fine-tunes open large language models in JAX. Start reading at `ftjax.train`."""

import os

# transformers serves for tokenizers here: its advice to install torch would only mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
