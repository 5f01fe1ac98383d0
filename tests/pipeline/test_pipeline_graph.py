import pytest

from pipeline.graph import workers_on


@pytest.mark.parametrize(
    ("cpus", "gpus", "room"),
    [(1, 0, 2), (2, 0, 0), (1, 1.0, 0)],
)
def test_a_worker_needs_its_cpus_on_one_node(cpus, gpus, room):
    assert workers_on([{"CPU": 1.0}, {"CPU": 1.0}], cpus, gpus) == room


def test_gpus_are_shared_by_fractions_where_the_cpus_suffice():
    nodes = [{"CPU": 16.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 8.0}, {"GPU": 1.0}]
    assert workers_on(nodes, 1, 1 / 3) == 3 + 2
    assert workers_on(nodes, 4, 0.5) == 2
    assert workers_on(nodes, 4, 0) == 4 + 2
