"""Rewards for runs of small models, named as support.rewards:FUNCTION."""

import math


def of_e(completion, example):
    """The share of the letter e."""
    return completion.count("e") / max(len(completion), 1)


def raises(completion, example):
    raise LookupError("no such color")


def no_number(completion, example):
    return math.nan


def of_prompt(completion, example):
    """The same for all completions of a prompt."""
    return float(len(example["messages"][0]["content"]))


def capital(completion, example):
    """Whether it begins with a capital letter."""
    return float(completion[:1].isupper())


def capitals(completion, example):
    """The share of letters that are capital ones, of three at least."""
    return sum(letter.isupper() for letter in completion) / max(len(completion), 3)


def of_conversation(completion, example):
    """How many messages it is told of."""
    return float(len(example["messages"]))
