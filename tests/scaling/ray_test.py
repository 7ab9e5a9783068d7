"""A sweep on a local Ray cluster of several nodes, one of which is killed in the middle."""

from __future__ import annotations

import threading
import time

import pytest
from optional import ray

from polar_jax.scaling import fanout, sweep
from polar_jax.stages import sweep as sweep_stage
from polar_jax.train.metrics import read_metrics

pytestmark = [pytest.mark.needs('ray'), pytest.mark.slow]


@pytest.fixture
def cluster():
  from ray.cluster_utils import Cluster

  made = Cluster(initialize_head=True, head_node_args={'num_cpus': 0})  # nothing runs on the head
  try:
    yield made
  finally:
    ray.shutdown()
    made.shutdown()


def test_every_run_is_done_once_though_a_node_dies(cluster, make, tmp_path, monkeypatch):
  nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
  context = make(tmp_path, backend='ray', ray_address=cluster.address, sizes=('8x1',), tokens=(30_000, 32_000, 34_000))
  killed = threading.Event()

  def kill_when_two_run():
    while not killed.is_set():
      running = [p.parent for p in (tmp_path / sweep.FOLDER).glob('8x1_tokens*/metrics.jsonl')]
      if len([folder for folder in running if sweep.read_result(folder) is None]) == 2:
        cluster.remove_node(nodes[0], allow_graceful=False)
        killed.set()
      time.sleep(0.05)

  thread = threading.Thread(target=kill_when_two_run)
  thread.start()
  try:
    found = sweep_stage.run(context)
    assert killed.is_set(), 'the sweep ended before a node could be killed'
  finally:
    killed.set()
    thread.join()
  assert found['sweep']['done'] == 3
  table = sweep.read_table(tmp_path / sweep.RESULTS)
  assert [*table] == [cell.name for cell in sweep.grid(context.config)]
  for name, row in table.items():
    steps = [r['step'] for r in read_metrics(tmp_path / sweep.FOLDER / name) if 'learning_rate' in r]
    assert steps == [*range(1, int(row['steps']) + 1)]
  monkeypatch.setattr(fanout, 'run_jobs', lambda *_: pytest.fail('ran again'))
  assert sweep_stage.run(context)['sweep']['done'] == 3
