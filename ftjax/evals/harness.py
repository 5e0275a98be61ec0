"""A model of ours for EleutherAI's lm-evaluation-harness (extra `harness`): what its tasks ask, our functions answer.

Requests are tokenized as its own Hugging Face backend does, so that the numbers are those of an exported model there.
"""

from collections.abc import Sequence

import jax
import numpy as np
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text

from ftjax.assemble import Base
from ftjax.errors import UserError
from ftjax.evals.likelihood import Item, log_likelihoods
from ftjax.sampling import stop_strings
from ftjax.sampling.engine import generate
from ftjax.sampling.sampler import Sampling
from ftjax.tree import Tree

NEW_TOKENS = 256  # of an answer, where the task does not say


class HarnessModel(TemplateLM):
    """`lm_eval.simple_evaluate(model=HarnessModel(base, variables, batch_size), tasks=[...])`.

    variables: of `base.model`, over a mesh; batch_size: prompts completed together.
    """

    def __init__(self, base: Base, variables: Tree, batch_size: int = 16):
        super().__init__()
        self.tokenizer, self.max_length = base.tokenizer, base.model.spec.max_position_embeddings
        self._base, self._variables, self._batch_size = base, variables, batch_size
        self._mesh = jax.tree.leaves(variables)[0].sharding.mesh

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._base.source.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """The token ids of a string; None: with what the tokenizer adds, unless the string begins with it."""
        if add_special_tokens is None:
            add_special_tokens = not has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple], disable_tqdm: bool = False, **kwargs
    ) -> list[tuple[float, bool]]:
        """requests: ((context, continuation), their token ids); of what is too long the beginning is left out."""
        items = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise UserError(f"a text of {len(continuation)} tokens exceeds the model's {self.max_length} positions")
            items.append(Item(context[-(self.max_length + 1 - len(continuation)) :], continuation))
        with jax.set_mesh(self._mesh):
            found = log_likelihoods(self._base.model, self._variables, items)
        answers = [(one.total, one.greedy) for one in found]
        for (strings, *_), answer in zip(requests, answers, strict=True):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows(*request.args) for request in requests]
        found = iter(self._loglikelihood_tokens([(None, *window) for its in windows for window in its]))
        totals = [sum(next(found)[0] for _ in its) for its in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        """A text in parts that fit the model, each predicted after what precedes it there."""
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [utils.make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        settings = [_settings(request.args[1]) for request in requests]
        for setting in dict.fromkeys(settings):
            indices = [index for index, its in enumerate(settings) if its == setting]
            texts = self._generate([requests[index].args[0] for index in indices], *setting)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return answers

    def _generate(self, contexts: list[str], new_tokens: int, until: tuple[str, ...], sampling: Sampling) -> list[str]:
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(f"an answer of {new_tokens} tokens exceeds the model's {self.max_length} positions")
        prompts = [np.asarray(self.tok_encode(context)[-room:], np.int32) for context in contexts]
        base = self._base
        with jax.set_mesh(self._mesh):
            done = generate(
                *(base.model, self._variables, prompts, new_tokens, base.end_tokens, sampling, self._batch_size),
                stops_at=stop_strings.stops_at(self._texts(until), self.tokenizer, "until"),
            )
        stops = [*until, self.tokenizer.decode(self.eot_token_id)]
        texts = (self.tokenizer.decode(completion.tokens, skip_special_tokens=True) for completion in done)
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _texts(self, until: tuple[str, ...]) -> list[str]:
        """Those that a text may have; others, such as the end token by its name, end it as tokens do."""
        special = self.tokenizer.all_special_tokens
        return [string for string in until if string and not any(token in string for token in special)]


def _settings(given: dict) -> tuple[int, tuple[str, ...], Sampling]:
    """(tokens at most, strings that end an answer, how tokens are drawn) of a request of the harness."""
    kwargs = normalize_gen_kwargs(given, NEW_TOKENS)
    until, tokens = tuple(kwargs.pop("until") or ()), kwargs.pop("max_gen_toks")
    sampled = kwargs.pop("do_sample", False)
    drawn = {name: kwargs.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in kwargs}
    if kwargs:
        raise UserError(f"the task asks for {sorted(kwargs)[0]!r} in generation_kwargs, which ftjax does not know")
    return tokens, until, Sampling(**drawn) if sampled else Sampling()
