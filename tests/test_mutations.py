"""A test that passes with a sign flipped is no test: every line below breaks the maths on purpose, and must be noticed.

Each mutation is a piece of the source of ``learner/loss/losses.py`` or ``learner/loss/advantages.py`` and what replaces
it; the broken module is made in memory and held against the slow truth. The last word of a loss's line names the check
of ``slow_truth`` that has to fail. ``OTHERS`` are breakages of other modules in the same form. A piece that is not in
the source exactly once fails too: the list follows the code.

Besides these, every operator, comparison, number and stop-gradient of the two files was changed once by a script. What
went unnoticed by the slow truth changes no result: ``A >= 0`` for ``A > 0`` (A = 0 multiplies it away), another number
in place of garbage under the mask, ``sum(1)`` for ``sum(-1)`` of two dimensions, a standard deviation of 1 for a group
of one; or is noticed by ``test_losses.py`` and ``test_advantages.py``, which hold the errors and the assertions.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from learner import optimizer, train
from learner.loss import advantages, losses
from tests import slow_truth

LOSSES = [
    # what is broken, piece of the source, its replacement, a check that notices
    ("sign of the clipped loss", "return -bounded_BT *", "return bounded_BT *", "policy_loss"),
    ("sign of every advantage", "inputs.advantages_BT, spec", "-inputs.advantages_BT, spec", "total_loss"),
    ("sign of cispo", "loss_BT = -ratio_BT", "loss_BT = ratio_BT", "policy_loss"),
    ("sign of sapo", "loss_BT = -(4", "loss_BT = (4", "policy_loss"),
    ("absolute advantages", "inputs.advantages_BT, spec", "inputs.advantages_BT.abs(), spec", "total_loss"),
    ("advantages of the next sequence", "inputs.advantages_BT, spec", "inputs.advantages_BT.roll(1, 0), spec",
     "total_loss"),
    # mask
    ("no mask, grpo", "return mask_BT / (mask_BT.shape[0] * mask_BT.sum", "return 1 / (mask_BT.shape[0] * mask_BT.sum",
     "coefficients"),
    ("no mask, dapo", "return mask_BT / mask_BT.sum()", "return torch.ones_like(mask_BT) / mask_BT.sum()",
     "coefficients"),
    ("no mask, dr_grpo", "return mask_BT / (mask_BT.shape[0] * max_tokens)",
     "return torch.ones_like(mask_BT) / (mask_BT.shape[0] * max_tokens)", "coefficients"),
    ("no mask in the sequence ratio", "torch.where(mask_BT > 0, difference_BT, 0).sum", "difference_BT.sum",
     "policy_loss"),
    ("no mask in the importance weights", "torch.where(mask_BT > 0, old_BT - sampler_BT, 0)",
     "old_BT - sampler_BT", "importance_weights"),
    ("mask upside down", "kept_BT = mask_BT > 0", "kept_BT = mask_BT <= 0", "total_loss"),
    ("no mask in the stats", "masked_BT = value_BT.detach() * mask_BT", "masked_BT = value_BT.detach() * 1",
     "total_loss"),
    ("garbage log-probs kept", "torch.where(kept_BT, logprobs_BT, 0)", "logprobs_BT", "total_loss"),
    ("garbage old log-probs kept", "torch.where(kept_BT, inputs.old_BT, 0)", "inputs.old_BT", "total_loss"),
    ("garbage sampler log-probs kept", "torch.where(kept_BT, inputs.sampler_BT, 0)", "inputs.sampler_BT", "total_loss"),
    ("garbage reference log-probs kept", "torch.where(kept_BT, inputs.reference_BT.detach(), 0)",
     "inputs.reference_BT.detach()", "total_loss"),
    ("garbage entropies kept", "torch.where(kept_BT, entropy_BT, 0)", "entropy_BT", "total_loss"),
    # tokens shifted by one
    ("old log-probs shifted", "logprobs_BT - old_BT.detach()", "logprobs_BT - old_BT.detach().roll(1, 1)",
     "policy_loss"),
    ("sampler log-probs shifted", "old_BT - sampler_BT, 0", "old_BT - sampler_BT.roll(1, 1), 0", "importance_weights"),
    ("reference shifted", "= reference_BT - logprobs_BT", "= reference_BT.roll(1, 1) - logprobs_BT", "kl"),
    ("coefficients shifted", "loss_BT * inputs.coef_BT", "loss_BT * inputs.coef_BT.roll(1, 1)", "total_loss"),
    ("importance weights shifted", "loss_BT = loss_BT * weights_BT", "loss_BT = loss_BT * weights_BT.roll(1, 1)",
     "total_loss"),
    # wrong divisor
    ("grpo: padded length", "mask_BT.sum(-1, keepdim=True).clamp(min=1))\n", "mask_BT.shape[1])\n", "coefficients"),
    ("grpo: tokens of the batch", "mask_BT.sum(-1, keepdim=True).clamp(min=1))\n", "mask_BT.sum().clamp(min=1))\n",
     "coefficients"),
    ("grpo: sum over sequences", "(mask_BT.shape[0] * mask_BT.sum", "(mask_BT.sum", "coefficients"),
    ("grpo: nan on a fully masked sequence", "mask_BT.sum(-1, keepdim=True).clamp(min=1))\n",
     "mask_BT.sum(-1, keepdim=True))\n", "coefficients"),
    ("fully masked sequences not counted", "(mask_BT.shape[0] * mask_BT.sum",
     "((mask_BT.sum(-1) > 0).sum() * mask_BT.sum", "coefficients"),
    ("dapo: padded tokens", "mask_BT / mask_BT.sum().clamp(min=1)", "mask_BT / mask_BT.numel()", "coefficients"),
    ("dapo: nan on a fully masked batch", "mask_BT / mask_BT.sum().clamp(min=1)", "mask_BT / mask_BT.sum()",
     "coefficients"),
    ("dr_grpo: padded length", "(mask_BT.shape[0] * max_tokens)", "(mask_BT.shape[0] * mask_BT.shape[1])",
     "coefficients"),
    ("dr_grpo: tokens of the batch", "(mask_BT.shape[0] * max_tokens)", "mask_BT.sum()", "coefficients"),
    ("grpo treated as dapo", '"grpo": Loss(clipped_loss, sequence', '"grpo": Loss(clipped_loss, token', "coefficients"),
    ("dapo treated as grpo", '"dapo": Loss(clipped_loss, token', '"dapo": Loss(clipped_loss, sequence', "coefficients"),
    ("cispo treated as grpo", "Loss(cispo_loss, token", "Loss(cispo_loss, sequence", "coefficients"),
    ("cispo's objective for sapo's", "Loss(sapo_loss,", "Loss(cispo_loss,", "policy_loss"),
    ("dr_grpo treated as dapo", "Loss(clipped_loss, constant", "Loss(clipped_loss, token", "coefficients"),
    # ratio
    ("ratio upside down", "logprobs_BT - old_BT.detach()", "old_BT.detach() - logprobs_BT", "policy_loss"),
    ("gradient through the old log-probs", "logprobs_BT - old_BT.detach()", "logprobs_BT - old_BT", "on_policy"),
    ("ratio without gradient", "return difference_BT.exp()", "return difference_BT.exp().detach()", "total_loss"),
    ("sequence ratio: sum, not mean", "sum_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)", "sum_B1", "policy_loss"),
    ("sequence ratio: padded length", "sum_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)",
     "sum_B1 / mask_BT.shape[1]", "policy_loss"),
    ("sequence ratio: nan on a masked sequence", "sum_B1 / mask_BT.sum(-1, keepdim=True).clamp(min=1)",
     "sum_B1 / mask_BT.sum(-1, keepdim=True)", "total_loss"),
    ("sequence ratio: mean of ratios", "mean_B1.exp().expand_as(difference_BT)",
     "((difference_BT.exp() * mask_BT).sum(-1, keepdim=True) / mask_BT.sum(-1, keepdim=True)).expand_as(mask_BT)",
     "policy_loss"),
    ("always token level", 'if level == "token":\n        return', "if level:\n        return", "policy_loss"),
    ("always sequence level", 'if level == "token":\n        return',
     "level = 'sequence'\n    if level == 'token':\n        return", "policy_loss"),
    # clip
    ("clip_low above", "clamp(max=1 + spec.clip_high)", "clamp(max=1 + spec.clip_low)", "policy_loss"),
    ("clip_high below", "clamp(min=1 - spec.clip_low,", "clamp(min=1 - spec.clip_high,", "policy_loss"),
    ("min for max above", "clamp(max=1 + spec.clip_high)", "clamp(min=1 + spec.clip_high)", "policy_loss"),
    ("min for max below", "clamp(min=1 - spec.clip_low, max=spec.delta or math.inf)", "clamp(max=1 - spec.clip_low)",
     "policy_loss"),
    ("max of the two objectives (pessimism lost)", "advantages_BT > 0,\n        ratio_BT.clamp(",
     "advantages_BT < 0,\n        ratio_BT.clamp(", "policy_loss"),
    ("both sides clipped always", "ratio_BT.clamp(max=1 + spec.clip_high)",
     "ratio_BT.clamp(1 - spec.clip_low, 1 + spec.clip_high)", "policy_loss"),
    ("negative advantages clipped above", "max=spec.delta or math.inf)", "max=1 + spec.clip_high)", "policy_loss"),
    ("delta ignored", "spec.delta or math.inf", "math.inf", "policy_loss"),
    ("positive advantages not clipped", "ratio_BT.clamp(max=1 + spec.clip_high)", "ratio_BT", "policy_loss"),
    ("negative advantages not clipped", "ratio_BT.clamp(min=1 - spec.clip_low, max=spec.delta or math.inf)", "ratio_BT",
     "policy_loss"),
    ("unclipped counted as clipped", "(bounded_BT != ratio_BT)", "(bounded_BT == ratio_BT)", "total_loss"),
    ("ratios just at cispo's cap counted", "(ratio_BT > spec.clip_high)", "(ratio_BT >= spec.clip_high)", "on_policy"),
    ("clips without advantage counted", "(bounded_BT != ratio_BT) & (advantages_BT != 0)", "bounded_BT != ratio_BT",
     "total_loss"),
    ("cispo: cap at 1 + clip_high", "clamp(max=spec.clip_high)", "clamp(max=1 + spec.clip_high)", "policy_loss"),
    ("cispo: floor for cap", "clamp(max=spec.clip_high)", "clamp(min=spec.clip_high)", "policy_loss"),
    ("cispo: gradient through the ratio", "clamp(max=spec.clip_high).detach()", "clamp(max=spec.clip_high)",
     "total_loss"),
    ("cispo: no log-prob", "* advantages_BT * logprobs_BT", "* advantages_BT", "policy_loss"),
    ("cispo: uncapped counted", "(ratio_BT > spec.clip_high)", "(ratio_BT < spec.clip_high)", "total_loss"),
    ("cispo: caps without advantage counted", "(ratio_BT > spec.clip_high) & (advantages_BT != 0)",
     "ratio_BT > spec.clip_high", "total_loss"),
    ("sapo: temperatures swapped", "masked_fill(advantages_BT > 0", "masked_fill(advantages_BT <= 0", "policy_loss"),
    ("sapo: one temperature", "masked_fill(advantages_BT > 0, spec.sapo_tau_positive)",
     "masked_fill(advantages_BT > 0, spec.sapo_tau_negative)", "policy_loss"),
    ("sapo: no 4 / tau", "-(4 / tau_BT)", "-4", "policy_loss"),
    ("sapo: gate not centred at 1", "(ratio_BT - 1)", "ratio_BT", "policy_loss"),
    # KL
    ("k1 upside down", "return -log_r_BT", "return log_r_BT", "kl"),
    ("k2 without half", ".square() / 2", ".square()", "kl"),
    ("k3 without -1", ".exp() - 1 - log_r_BT", ".exp() - log_r_BT", "kl"),
    ("k3 with + log r", ".exp() - 1 - log_r_BT", ".exp() - 1 + log_r_BT", "kl"),
    ("KL of the reference from the policy", "= reference_BT - logprobs_BT", "= logprobs_BT - reference_BT", "kl"),
    ("KL without ratio", "return weight_BT * kl_BT(", "return kl_BT(", "total_loss"),
    ("KL with a constant ratio", 'ratio_BT.detach() if kind == "k2" else ratio_BT', "ratio_BT.detach()", "total_loss"),
    ("k2 with a differentiable ratio", 'ratio_BT.detach() if kind == "k2" else ratio_BT', "ratio_BT", "total_loss"),
    ("KL subtracted", "loss_BT + spec.kl_coef *", "loss_BT - spec.kl_coef *", "total_loss"),
    ("KL without coefficient", "loss_BT + spec.kl_coef *", "loss_BT +", "total_loss"),
    ("KL importance-weighted", "loss_BT + spec.kl_coef *", "loss_BT + weights_BT * spec.kl_coef *", "total_loss"),
    ("gradient into the reference", "inputs.reference_BT.detach()", "inputs.reference_BT", "total_loss"),
    # importance
    ("importance upside down", "old_BT - sampler_BT, 0", "sampler_BT - old_BT, 0", "importance_weights"),
    ("importance weights not constant", "with torch.no_grad():", "with torch.enable_grad():", "importance_weights"),
    ("importance: mean, not sum", "difference_BT.sum(-1, keepdim=True).expand_as",
     "difference_BT.mean(-1, keepdim=True).expand_as", "importance_weights"),
    ("importance: levels swapped", 'level == "sequence":\n            difference',
     'level == "token":\n            difference', "importance_weights"),
    ("importance: floor for cap", "weights_BT.clamp(max=cap)", "weights_BT.clamp(min=cap)", "importance_weights"),
    ("importance: no cap", "weights_BT.clamp(max=cap)", "weights_BT", "importance_weights"),
    ("importance: truncated when masked", "torch.where(weights_BT > cap, 0, weights_BT)", "weights_BT.clamp(max=cap)",
     "importance_weights"),
    ("importance: the cap itself masked", "torch.where(weights_BT > cap", "torch.where(weights_BT >= cap",
     "importance_weights"),
    ("importance: small weights masked", "torch.where(weights_BT > cap", "torch.where(weights_BT < cap",
     "importance_weights"),
    ("importance: kept weights become 1", "torch.where(weights_BT > cap, 0, weights_BT)",
     "(weights_BT <= cap).double()", "importance_weights"),
    ("importance weights unused", "loss_BT = loss_BT * weights_BT", "loss_BT = loss_BT", "total_loss"),
    ("importance of the current policy", "importance_weights(old_BT,", "importance_weights(logprobs_BT,", "total_loss"),
    # entropy and stats
    ("entropy punished", ".sum() - spec.entropy_coef", ".sum() + spec.entropy_coef", "total_loss"),
    ("entropy summed", "entropy_BT.sum() / max(inputs.num_tokens, 1)", "entropy_BT.sum()", "total_loss"),
    ("entropy by the loss's coefficients", "entropy_BT.sum() / max(inputs.num_tokens, 1)",
     "(entropy_BT * inputs.coef_BT).sum()", "total_loss"),
    ("entropy without gradient", "entropy_coef * entropy_BT.sum()", "entropy_coef * entropy_BT.detach().sum()",
     "total_loss"),
    ("graph kept alive by the loss", '"loss": loss.detach()', '"loss": loss', "total_loss"),
    ("graph kept alive by the stats", "value_BT.detach() * mask_BT", "value_BT * mask_BT", "total_loss"),
    ("signed sampler difference", "(old_BT - sampler_BT).abs()", "old_BT - sampler_BT", "total_loss"),
    ("smallest for largest", "masked_BT.max() if", "masked_BT.min() if", "total_loss"),
    ("maxima added up", 'column.max() if key.endswith("_max") else column.sum()', "column.sum()", "mean_stats"),
    ("means of means", 'tokens = max(total["tokens"], 1.0)', "tokens = len(parts)", "mean_stats"),
    ("losses averaged", "else column.sum() for", "else column.mean() for", "mean_stats"),
]  # fmt: skip

ADVANTAGES = [
    # what is broken, piece of the source, its replacement
    ("sign", "advantage=(reward - baseline)", "advantage=(baseline - reward)"),
    ("no baseline", "advantage=(reward - baseline)", "advantage=reward"),
    ("mean over the batch", "mean(of_group) if of_group else 0.0",
     "mean([reward for some in rewards for reward in some])"),
    ("float mean", "mean(of_group) if", "sum(of_group) / len(of_group) if"),
    ("rewards of the next completion", "zip(group.completions, of_group, strict=True)",
     "zip(group.completions, of_group[1:] + of_group[:1])"),
    ("rewards of another group", "zip(groups, rewards, strict=True)", "zip(groups, [rewards[0]] * len(groups))"),
    ("std with ddof 0", "return stdev(values)", "from statistics import pstdev; return pstdev(values)"),
    ("variance for std", "return stdev(values)", "return stdev(values) ** 2"),
    ("no epsilon", "EPSILON = 1e-4", "EPSILON = 0.0001 * 1e-9"),
    ("another epsilon", "EPSILON = 1e-4", "EPSILON = 1e-6"),
    ("epsilon under the root", "return 1 / (_std(rewards) + EPSILON)", "return (_std(rewards) ** 2 + EPSILON) ** -0.5"),
    ("zscore by the batch", "return 1 / (_std(rewards)", "return 1 / (batch_std"),
    ("batch_std by the group", "return 1 / (batch_std", "return 1 / (_std(rewards)"),
    ("multiplied by the std", "return 1 / (_std(rewards) + EPSILON)", "return _std(rewards) + EPSILON"),
    ("no_std divided", "return 1.0", "return 1 / (_std(rewards) + EPSILON)"),
    ("leave_one_out includes itself", "return len(rewards) / max(len(rewards) - 1, 1)", "return 1.0"),
    ("leave_one_out upside down", "return len(rewards) / max(len(rewards) - 1, 1)",
     "return (len(rewards) - 1) / len(rewards)"),
    ("two kinds swapped", '"zscore": zscore', '"zscore": no_std'),
    ("any group has signal", "len(set(_rewards(group))) > 1", "len(set(_rewards(group))) > 0"),
    ("only varied groups have signal", "len(set(_rewards(group))) > 1", "len(set(_rewards(group))) > 2"),
    ("rounding is signal", "ROUNDING = 1e-9", "ROUNDING = 0.0"),
    ("small rewards are rounding", "ROUNDING = 1e-9", "ROUNDING = 1e-3"),
    ("rounding of large rewards is signal", "ROUNDING * max([1.0, *map(abs, rewards)])", "ROUNDING"),
    ("length rewarded", "reward=reward - min(", "reward=reward + min("),
    ("penalty without limit", "min(max(excess, 0.0), 1.0)", "max(excess, 0.0)"),
    ("short answers rewarded", "min(max(excess, 0.0), 1.0)", "min(excess, 1.0)"),
    ("penalty all at once", "min(max(excess, 0.0), 1.0)", "float(excess > 0)"),
    ("penalty beyond the limit only", "free_tokens = max_tokens - overlong_tokens", "free_tokens = max_tokens"),
    ("penalty over the whole length", "- free_tokens) / overlong_tokens", "- free_tokens) / max_tokens"),
    ("rewards replaced", "reward=reward - min(max(excess, 0.0), 1.0)", "reward=-min(max(excess, 0.0), 1.0)"),
]  # fmt: skip


OTHERS = [
    # what is broken, module, piece of the source, its replacement, the check
    ("groups without signal dropped", train,
     "return sorted(scored, key=lambda group: not advantages.has_signal(group))",
     "return [group for group in scored if advantages.has_signal(group)]", "batch"),
    ("groups as they came", train, "return sorted(scored, key=lambda group: not advantages.has_signal(group))",
     "return list(scored)", "batch"),
    ("groups without signal first", train, "key=lambda group: not advantages", "key=lambda group: advantages", "batch"),
    ("more groups than a step has", train, "has_signal(group))[:size]", "has_signal(group))", "batch"),
    ("a last step at rate 0", optimizer, "else updates + 1", "else updates", "rates"),
    ("no step at the end", optimizer, "end = updates if", "end = updates + 1 if", "rates"),
    ("the warm-up counted twice", optimizer, "(update - config.warmup_steps + 1)", "(update + 1)", "rates"),
]  # fmt: skip


def mutate(module: types.ModuleType, piece: str, replacement: str) -> types.ModuleType:
    """The module with one piece of its source replaced."""
    path = Path(str(module.__file__))
    source = path.read_text(encoding="utf-8")
    assert source.count(piece) == 1, f"{piece!r} is {source.count(piece)} times in {path.name}"
    broken = types.ModuleType(f"broken_{path.stem}")
    sys.modules[broken.__name__] = broken  # where dataclasses look their module up
    exec(compile(source.replace(piece, replacement), f"broken {path.name}", "exec"), broken.__dict__)
    return broken


@pytest.mark.parametrize(("piece", "replacement", "check"), [row[1:] for row in LOSSES], ids=[row[0] for row in LOSSES])
def test_a_broken_loss_is_noticed(piece: str, replacement: str, check: str) -> None:
    broken = mutate(losses, piece, replacement)
    with pytest.raises(AssertionError):
        getattr(slow_truth, f"check_{check}")(broken)


@pytest.mark.parametrize(("piece", "replacement"), [row[1:] for row in ADVANTAGES], ids=[row[0] for row in ADVANTAGES])
def test_broken_advantages_are_noticed(piece: str, replacement: str) -> None:
    broken = mutate(advantages, piece, replacement)
    with pytest.raises(AssertionError):
        slow_truth.check_advantages(broken)


@pytest.mark.parametrize(
    ("module", "piece", "replacement", "check"), [row[1:] for row in OTHERS], ids=[row[0] for row in OTHERS]
)
def test_another_breakage_is_noticed(module: types.ModuleType, piece: str, replacement: str, check: str) -> None:
    getattr(slow_truth, f"check_{check}")(module)
    broken = mutate(module, piece, replacement)
    with pytest.raises(AssertionError):
        getattr(slow_truth, f"check_{check}")(broken)
