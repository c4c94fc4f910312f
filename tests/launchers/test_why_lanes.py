"""What `datasets` lacks for exact resuming, and why the launcher reads streams in lanes of its own.

If one of these fails, `datasets` has learned it, and own code may go (docs/data.md, "Why lanes").
"""

import copy

import datasets
from datasets.distributed import split_dataset_by_node

NUM_DOCUMENTS = 64


def documents():
    rows = datasets.Dataset.from_dict({"number": list(range(NUM_DOCUMENTS))})
    return rows.to_iterable_dataset(num_shards=4)


def read(rows, count=None):
    """The numbers of the next documents, and the state after them."""
    found = []
    for row in rows:
        found.append(row["number"])
        if len(found) == count:
            break
    return found, copy.deepcopy(rows.state_dict())


def test_a_resumed_shuffle_loses_what_its_buffer_held():
    rows = documents().shuffle(seed=0, buffer_size=16)
    seen, state = read(rows, 20)
    resumed = documents().shuffle(seed=0, buffer_size=16)
    resumed.load_state_dict(state)
    rest, _ = read(resumed)
    assert len(set(seen) | set(rest)) < NUM_DOCUMENTS


def test_other_numbers_of_ranks_cannot_go_on():
    seen, states = [], []
    for rank in range(2):
        found, state = read(split_dataset_by_node(documents(), rank=rank, world_size=2), 10)
        seen += found
        states.append(state)
    assert len(set(seen)) == 20
    for state in states:
        alone = split_dataset_by_node(documents(), rank=0, world_size=1)
        alone.load_state_dict(state)
        rest, _ = read(alone)
        assert sorted(seen + rest) != list(range(NUM_DOCUMENTS))
