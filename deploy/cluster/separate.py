"""Sampler and learner as services on a Ray cluster, each on devices of its own: the parts of a run, wired together.

Joins the cluster before it imports what imports Ray, because what a private cluster listens on is decided there. Used
by ``deploy/run.py``; ``deploy/colocated.py`` is the same for one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path

from common.errors import LearnerLost, UserError
from deploy.cluster import connection
from deploy.components import Components, Prepared, sampler_setup, warn_if_slow
from learner.model import resolve


class SeparateDevices:
    """A ``Placement`` where each side has devices of its own: no side has to free memory."""

    def sampling(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    learning = syncing = sampling


@contextlib.contextmanager
def parts(ready: Prepared, folder: Path, say: Callable[[str], None]) -> Iterator[Components]:
    """Sampler replicas and learner ranks as services; those that are lost are replaced; ``say`` prints for people."""
    config, timeouts = ready.config, ready.config.timeouts
    with contextlib.ExitStack() as stack:
        stack.enter_context(connection.joined(config))
        from deploy.cluster.calls import Restarts
        from deploy.cluster.learner_ranks import LearnerRanks
        from deploy.cluster.resources import Cluster
        from deploy.cluster.sampler_pool import SamplerPool

        cluster = Cluster(config, say, resuming=any((folder / "checkpoints").glob("step-*")))
        restarts = Restarts(config.cluster.max_restarts, say)
        setup = sampler_setup(ready, shares_device=False, threads=max(1, int(config.cluster.sampler_cpus)), base=False)
        vocabulary = max(len(ready.tokenizer), resolve.vocabulary(ready.folder))
        learner = LearnerRanks(config, cluster)
        pool = SamplerPool(config, setup, vocabulary, restarts, cluster, learner.deliver)

        def open_learner() -> None:
            while True:
                try:
                    return learner.open()
                except LearnerLost as failure:
                    restarts.count(str(failure))

        def recover(failure: LearnerLost) -> None:
            restarts.count(str(failure))
            pool.forget()
            learner.restart()

        stack.callback(cluster.close)
        cluster.take_room()
        stack.callback(pool.close)
        stack.callback(learner.close)
        with futures.ThreadPoolExecutor(2) as threads:
            opening = [threads.submit(pool.open), threads.submit(open_learner)]
        for side in opening:
            side.result()
        if blind := learner.sees(folder / "config.toml"):
            raise UserError(
                f"run.folder={str(folder)!r} is not on storage that every node sees: {', '.join(blind)} does not find "
                "config.toml in it; give a folder that is"
            )
        facts = learner.facts
        warn_if_slow(config, facts["device"])
        replaced_s = timeouts.start_s + timeouts.load_s + 2 * timeouts.sync_s
        tries = config.cluster.max_restarts + 1
        yield Components(
            pool,
            learner,
            SeparateDevices(),
            f"sampler {config.sampler.name} x {config.cluster.samplers}: {', '.join(pool.places())}\n"
            f"learner {facts['parameters_trained'] / 1e6:.1f} M of {facts['parameters_total'] / 1e6:.1f} M weights, "
            f"{'packed' if facts['packed'] else 'padded'}, {config.model.dtype}, {facts['device']}: "
            f"{', '.join(learner.places())}",
            memory_gib=learner.memory_gib,
            # Each wait inside has its own limit; these are their sums.
            answer_s=tries * (timeouts.generate_s + replaced_s),
            sync_s=timeouts.generate_s + tries * replaced_s,
            restarts=lambda: restarts.made,
            recover=recover,
        )
