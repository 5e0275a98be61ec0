"""Batches of the best of what the model writes: a prompt's best completion, or its best and its worst as a pair."""

from collections.abc import Callable, Sequence

import numpy as np

from ftjax import distributed, rewarding
from ftjax.data.batch import packing
from ftjax.data.format.example import Document
from ftjax.rollouts import Rollouts, Written, differing, lay
from ftjax.training.source import Batch
from ftjax.training.state import TrainState

# (rewards float64 [prompts, samples], the least that counts) -> int [prompts, documents]: of each prompt the
# completions that are learned from, in the order of a row's documents, and bool [prompts]: whether there is something
# to learn. Of completions with equal rewards the first counts.
Choose = Callable[[np.ndarray, float], tuple[np.ndarray, np.ndarray]]


def best_and_worst(rewards: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """As pairs, the better one first; equal ones say nothing (Guo et al. 2024, arXiv:2402.04792, section 3)."""
    return np.stack([rewards.argmax(axis=1), rewards.argmin(axis=1)], axis=1), differing(rewards)


def best(rewards: np.ndarray, least: float) -> tuple[np.ndarray, np.ndarray]:
    """Where it is good enough (Dong et al. 2023, arXiv:2304.06767; Touvron et al. 2023, section 3.2.3)."""
    return rewards.argmax(axis=1)[:, None], rewards.max(axis=1) >= least


CHOICES: dict[str, Choose] = {"pairs": best_and_worst, "best": best}


class Selected(Rollouts):
    """A batch has a row for each prompt, with what is chosen of its config.rollouts.samples completions.

    A row of which nothing is learned is there without weights.
    """

    def _make(self, round_: int, state: TrainState) -> Batch:
        written, grades = self._graded(round_, 0, state)
        settings = self._config.objective
        stopped = np.array([one.stopped for one in written.completions])
        rewards = self._groups(written, rewarding.weighted(self._rewards, grades))
        total = rewards.reshape(-1)
        chosen, teaches = CHOICES[self._program.method.source](rewards, settings.least_reward)
        places = chosen + np.arange(len(rewards))[:, None] * self.samples
        if distributed.is_first():
            signs = np.zeros(len(total))
            for document, sign in zip(places.T, (1.0, -1.0), strict=False):
                signs[document[teaches]] = sign
            self._record(round_ * self.updates + 1, written, grades, signs, "chosen")
        arrays = self._rows(written, places, teaches)
        found = self._metrics(grades, total, written.completions) | {
            "val/contain_eos_token": float(stopped.mean()),
            "groups/written": float(len(rewards)),
            "groups/kept": float(teaches.sum()),
        }
        values = total[places]
        if values.shape[1] > 1:
            entropies = [-one.tempered_logps.sum() for one in written.completions]
            found["objective/scores_margin"] = float((values[:, 0] - values[:, 1]).mean())
            found |= {"objective/scores": float(total.mean()), "objective/entropy": float(np.mean(entropies))}
        else:
            found["reward_best"] = float(values.mean())
        return Batch(arrays, int((arrays["segment_ids"] > 0).sum()), found)

    def _rows(self, written: Written, places: np.ndarray, teaches: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of BATCH, [prompts, T]: a row has the documents of the completions at `places`."""
        rows: list[Sequence[Document]] = []
        for its, learned in zip(places, teaches, strict=True):
            documents = [written.completions[i].document(written.prompts[i]) for i in its]
            rows.append([document._replace(trained=document.trained & learned) for document in documents])
        return lay(rows, self._loader.multiple, self._program.row_length, packing.BATCH)
