"""EleutherAI's lm-evaluation-harness on a run or a model (pip install 'ftjax[harness]').

    python -m ftjax.harness --workdir runs/quickstart --tasks arc_easy,hellaswag     the best checkpoint of a run
    python -m ftjax.harness --model M --tasks mine --include_path tasks/             tasks of your own, as YAML files
    python -m ftjax.harness --model M --tasks gsm8k --apply_chat_template --num_fewshot 4 --limit 100 --out FILE.json

Tasks are the harness's own, and what they download comes from the Hugging Face Hub.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags

from ftjax import assemble, cli, distributed
from ftjax import config as configs
from ftjax.adapted import NONE, load_model
from ftjax.assemble import Base
from ftjax.atomic import write_text
from ftjax.errors import UserError
from ftjax.evals import best
from ftjax.method import check_generates
from ftjax.prompts import check_out
from ftjax.training.display import Display
from ftjax.tree import Tree


def evaluate(base: Base, variables: Tree, tasks: list[str], include_path: str | None, batch_size: int, **options):
    """What `lm_eval.simple_evaluate` returns; options are its own.

    Raises:
      UserError: the extra is not installed; a task that the harness does not know.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager

        from ftjax.evals.harness import HarnessModel
    except ImportError as error:
        raise UserError(f"the harness is not installed ({error}); pip install 'ftjax[harness]'") from error
    manager = TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise UserError(f"--tasks: the harness has no task {unknown[0]!r}; --include_path names a folder of your own")
    model = HarnessModel(base, variables, batch_size)
    return lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, **options)


def _rows(metrics: Mapping[str, Any]) -> dict[str, str]:
    """{"acc": "0.5 ± 0.05"}: the metrics of a task, which the harness calls "acc,none" and "acc_stderr,none"."""
    rows = {}
    for name, value in metrics.items():
        metric, _, kind = name.partition(",")
        if isinstance(value, float) and not metric.endswith("_stderr"):
            error = metrics.get(f"{metric}_stderr,{kind}")
            beside = f" ± {error:.2g}" if isinstance(error, float) else ""
            rows[metric if kind in ("", "none") else f"{metric} ({kind})"] = f"{value:.4g}{beside}"
    return rows


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; tasks go after --tasks")
    if bool(FLAGS.workdir) == bool(FLAGS.model):
        raise UserError("give either --workdir (a run) or --model")
    if FLAGS.workdir and FLAGS["dtype"].present:
        raise UserError("--dtype goes with --model; a --workdir has the dtype of its config")
    if not FLAGS.tasks:
        raise UserError("give --tasks NAME,NAME")
    distributed.refuse_several("ftjax.harness")
    if FLAGS.out:
        check_out(Path(FLAGS.out))
    if FLAGS.workdir:
        workdir = Path(FLAGS.workdir)
        step = best.choose(workdir, FLAGS.step)
        _, base, variables, _ = assemble.load_run(workdir, step, check=check_generates)
    else:
        base, loaded = load_model(FLAGS.model, {}, FLAGS.dtype)
        variables = loaded[NONE]
    options = {"num_fewshot": FLAGS.num_fewshot, "limit": FLAGS.limit, "apply_chat_template": FLAGS.apply_chat_template}
    found = evaluate(base, variables, FLAGS.tasks, FLAGS.include_path, FLAGS.batch_size, **options)
    with Display(1) as display:
        for task, metrics in found["results"].items():
            display.table(task, _rows(metrics))
    if FLAGS.out:
        write_text(Path(FLAGS.out), json.dumps(found["results"], indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.argv[0] = "ftjax.harness"  # absl shows in --help the flags defined under this name
    FLAGS = flags.FLAGS
    flags.DEFINE_string("workdir", None, "a run of ftjax.train")
    flags.DEFINE_string("step", None, best.STEP_HELP)
    flags.DEFINE_string("model", None, "a Hugging Face id, a directory, a .gguf file or package:NAME")
    flags.DEFINE_enum("dtype", "float32", configs.DTYPES, "dtype of weights and computation, with --model")
    flags.DEFINE_list("tasks", None, "tasks and groups of the harness, with commas between them")
    flags.DEFINE_string("include_path", None, "a folder with tasks of your own, as YAML files")
    flags.DEFINE_integer("num_fewshot", None, "examples in the prompt; the task's own number, if not given")
    flags.DEFINE_integer("limit", None, "at most so many examples of each task", lower_bound=1)
    flags.DEFINE_boolean("apply_chat_template", False, "ask in the model's chat template")
    flags.DEFINE_integer("batch_size", 16, "prompts completed together", lower_bound=1)
    flags.DEFINE_string("out", None, "the JSON file to write the results to")
    cli.run(main)
