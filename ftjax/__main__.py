"""ftjax COMMAND ... is python -m ftjax.COMMAND ...

ftjax                            the commands
ftjax train --config chat ...    one of them
ftjax help train                 what it takes
"""

import runpy
import sys

from ftjax import cli
from ftjax.errors import did_you_mean

# In the order in which they are used.
COMMANDS = {
    "inspect_data": "see, count and check the rows that a run would be trained on",
    "curate": "deduplicate, filter, split, mix, convert and sample files of rows",
    "plan": "whether a run fits a TPU slice that need not be there, and how fast it can be",
    "train": "fine-tune a model as a config says; the same command resumes",
    "sweep": "runs with other settings each, one after another or as a job array, and which is best",
    "pipeline": "trainings that follow from each other, such as supervised, reward model, PPO, and their comparison",
    "evaluate": "whether a run helped: its model against what prompts can do with its base, and a verdict",
    "generate": "text from a model, an adapter or a run: one prompt, a conversation, or a file of prompts",
    "score": "the rewards of rows by a reward model; of preference pairs its accuracy and calibration, too",
    "harness": "EleutherAI's lm-evaluation-harness on a run or a model",
    "report": "what came of a run as one page, or of several beside each other",
    "export": "a run's result for other software: a PEFT adapter, a Hugging Face model, a GGUF",
    "models": "which models there are, and which formats each is read from and written as",
    "label": "ask people which of two answers is better, the most informative pairs first; training reads it",
    "constitution": "critiques, revisions and preferences that a model writes itself, by principles of a file",
    "serve": "OpenAI's files, fine-tuning jobs and answers behind HTTP, on this machine",
    "import_config": "a config of Axolotl's as one of ours",
}

_USAGE = """ftjax fine-tunes open large language models.

    ftjax train --config chat --config.model.source=MODEL --config.data.train=rows.jsonl

Commands; `ftjax COMMAND --help` (or python -m ftjax.COMMAND --help) says what each takes:

{commands}"""


def main() -> int | None:
    words = sys.argv[1:]
    if words[:1] == ["help"]:
        words = [*words[1:], *(["--help"] if len(words) > 1 else [])]
    if not words or words[0] in ("--help", "-h"):
        width = max(map(len, COMMANDS))
        with cli.piped():
            print(_USAGE.format(commands="\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())))
        return 0
    name = words[0].removeprefix("ftjax.").replace("-", "_")
    if name not in COMMANDS:
        print(f"error: ftjax has no command {words[0]!r}{did_you_mean(name, COMMANDS)}", file=sys.stderr)
        return 2
    sys.argv = [name, *words[1:]]
    runpy.run_module(f"ftjax.{name}", run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
