"""A task whose reward tells every token apart: it rises within a few small steps, as tests/toy.py's does not.

A user's own file, shipped with a job: ``task.name = "tests/cluster/low.py:Low"``.
"""

from tests.toy import Toy


class Low(Toy):
    """Pays the share of tokens from the lower half of the tiny vocabulary."""

    reward_weights = {"low": 1.0}  # noqa: RUF012 (a plain attribute, as a user would write it)

    def __init__(self):
        super().__init__()
        self.rewards = {"low": self.low}

    def low(self, prompt, completion):
        return sum(token < 192 for token in completion.token_ids) / len(completion.token_ids)
