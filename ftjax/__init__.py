"""ftjax fine-tunes open large language models in JAX. Start reading at `ftjax.train`."""

import os
import signal
import sys

# transformers serves for tokenizers here: its advice to install torch would only mislead.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if getattr(sys, "argv", None) and sys.argv[0] == "-m":
    # A command line is being imported, for seconds: until `cli.run` Ctrl-C ends it without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
