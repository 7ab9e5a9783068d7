"""A sweep on a local Ray cluster of several nodes, one of which is killed while it works."""

from __future__ import annotations

import threading
import time

import pytest
from optional import ray

from polar_jax.scaling import fanout, grid, results
from polar_jax.stages import sweep as stage
from polar_jax.train.metrics import read_metrics

pytestmark = [pytest.mark.needs('ray'), pytest.mark.slow]


@pytest.fixture
def cluster():
  from ray.cluster_utils import Cluster

  started = Cluster(initialize_head=True, head_node_args={'num_cpus': 0})  # no job runs on the head node
  try:
    yield started
  finally:
    ray.shutdown()
    started.shutdown()


def test_every_run_is_done_once_even_if_a_node_dies(cluster, make_sweep, tmp_path, monkeypatch):
  nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
  context = make_sweep(tmp_path, backend='ray', ray_address=cluster.address, sizes=('8x1',), tokens=(30_000, 32_000, 34_000))
  killed = threading.Event()

  def kill_once_two_run():
    while not killed.is_set():
      running = [p.parent for p in (tmp_path / grid.FOLDER).glob('8x1_tokens*/metrics.jsonl')]
      if len([folder for folder in running if results.read_result(folder) is None]) == 2:
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.set()
      time.sleep(0.05)

  thread = threading.Thread(target=kill_once_two_run)
  thread.start()
  try:
    section = stage.run(context)
    assert killed.is_set(), 'the sweep ended before a node could be killed'
  finally:
    killed.set()
    thread.join()
  assert section['sweep']['done'] == 3
  table = results.read_table(tmp_path / results.TABLE)
  assert [*table] == [cell.name for cell in grid.cells_of(context.config)]
  for name, row in table.items():
    steps = [r['step'] for r in read_metrics(tmp_path / grid.FOLDER / name) if 'learning_rate' in r]
    assert steps == [*range(1, int(row['steps']) + 1)]
  monkeypatch.setattr(fanout, 'run_jobs', lambda *_: pytest.fail('ran again'))
  assert stage.run(context)['sweep']['done'] == 3
