"""Which curves there are of a run's records, or of several runs', and which of them share a chart."""

from collections.abc import Sequence

from ftjax.reporting.charts import Chart, Series
from ftjax.reporting.gather import GENERAL, Run, is_finite, mode_of, shows_share

_LEFT_OUT = ("step", "epoch", "num_tokens")
_TRAINING = "training"
_FORGOTTEN = ("change", "kl")
# In this order; scores of sets come after the loss, all others are further curves.
_FIRST = (
    "reward",
    "loss",
    "mean_token_accuracy",
    "rewards/accuracies",
    "rewards/margins",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
)
_TITLES = {
    "loss": "Loss",
    "mean_token_accuracy": "Accuracy of tokens",
    "rewards/accuracies": "Pairs with the better answer preferred",
    "rewards/margins": "Margin of the rewards",
    "learning_rate": "Learning rate",
    "grad_norm": "Norm of the gradient",
    "tokens_per_second": "Tokens per second",
}


def of_run(run: Run) -> tuple[list[Chart], list[Chart]]:
    """(the curves to see first, the further ones). Training and held-out rows share a chart, as do scored sets."""
    trained = _trained(run)
    groups: dict[str, list[Series]] = {}
    modes: dict[str, str] = {}
    for name, series in _metrics(run).items():
        group, label = _place(name, trained)
        groups.setdefault(group, []).append(Series(label, series.points))
        modes[group] = mode_of(name, trained)
    for together in groups.values():
        together.sort(key=lambda series: series.name != _TRAINING)
    first = [name for name in _FIRST if name in groups]
    scored = [name for name in groups if name not in trained]
    order = [*first[:1], *scored, *first[1:]] if first[:1] in (["loss"], ["reward"]) else [*scored, *first]
    return _charts(groups, modes, order)


def of_runs(runs: Sequence[Run], names: Sequence[str]) -> tuple[list[Chart], list[Chart]]:
    """The same of several runs: a chart for each metric, with a curve for each run that has it."""
    groups: dict[str, list[Series]] = {}
    modes: dict[str, str] = {}
    for run, name in zip(runs, names):
        for metric, series in _metrics(run).items():
            groups.setdefault(metric, []).append(Series(name, series.points))
            modes[metric] = mode_of(metric, _trained(run))
    order = [name for name in groups if name == "loss" or (name.startswith("eval_") and not is_category(name))]
    order += [name for name in _FIRST if name in groups and name not in order]
    return _charts(groups, modes, order)


def is_category(name: str) -> bool:
    """Whether a metric is that of one kind of general text, of which there may be dozens."""
    return name.startswith(GENERAL) and name.removeprefix(GENERAL) not in ("loss", *_FORGOTTEN)


def _charts(
    groups: dict[str, list[Series]], modes: dict[str, str], order: Sequence[str]
) -> tuple[list[Chart], list[Chart]]:
    charts = {}
    for name, together in groups.items():
        percent = shows_share(modes[name], [value for series in together for _, value in series.points])
        charts[name] = Chart(_TITLES.get(name, name), together, percent)
    return [charts[name] for name in order], [chart for name, chart in charts.items() if name not in order]


def _trained(run: Run) -> set[str]:
    return {name for record in run.records for name in record if not name.startswith("eval_")}


def _metrics(run: Run) -> dict[str, Series]:
    """{name: its finite values}, in order of steps; the later where a step has two."""
    points: dict[str, dict[int, float]] = {}
    for record in run.records:
        for name, value in record.items():
            if name not in _LEFT_OUT and is_finite(value):
                points.setdefault(name, {})[record["step"]] = value
    return {name: Series(name, sorted(values.items())) for name, values in points.items()}


def _place(name: str, trained: set[str]) -> tuple[str, str]:
    """(chart, label in it) of a metric."""
    rest = name.removeprefix("eval_")
    if rest == name:
        return name, _TRAINING
    if rest in trained:
        return rest, "held out"
    scored, _, metric = rest.rpartition("/")
    if name.startswith(GENERAL):
        return ("Forgetting: nats per token" if metric in _FORGOTTEN else "General text: nats per token"), metric
    return (metric, scored) if scored else (rest, "held out")
