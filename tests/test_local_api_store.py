"""Properties of the store: paging and filters against a plain list, transactions under threads, atomic files."""

import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from local_api.jobs import metadata_filter
from local_api.store import EVENT, JOB, Store, public

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
METADATA = st.none() | st.dictionaries(TEXT, TEXT, max_size=3)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path)
    yield store
    store.close()


class Query:
    def __init__(self, **parameters):
        self.query_params = self
        self.parameters = parameters

    def multi_items(self):
        return self.parameters.items()


def all_pages(store, limit, order, where="1", parameters=(), between=lambda: None):
    """Follow `after` from page to page, as a client does."""
    found, after, has_more = [], None, True
    while has_more:
        data, has_more = store.page(JOB, after=after, limit=limit, order=order, where=where, parameters=parameters)
        assert len(data) == limit or not has_more
        found += [document["id"] for document in data]
        after = found[-1] if found else None
        between()
    return found


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(METADATA, max_size=12), st.integers(1, 5), st.sampled_from(["asc", "desc"]), st.data())
def test_pages_are_the_whole_list_once_and_filters_hold(tmp_path_factory, marks, limit, order, data):
    store = Store(tmp_path_factory.mktemp("store"))
    jobs = [store.add({"object": JOB, "id": f"job-{n}", "metadata": mark}) for n, mark in enumerate(marks)]
    store.add({"object": EVENT, "id": "event", "metadata": {}})  # other kinds are not in the list
    expected = jobs if order == "asc" else jobs[::-1]
    assert all_pages(store, limit, order) == [job["id"] for job in expected]

    pairs = [pair for mark in marks if mark for pair in mark.items()] + [("unknown", "pair")]
    wanted = dict(data.draw(st.lists(st.sampled_from(pairs), max_size=2)))
    where, parameters = metadata_filter(Query(**{f"metadata[{key}]": value for key, value in wanted.items()}))
    matching = [job["id"] for job in expected if wanted.items() <= (job["metadata"] or {}).items()]
    assert all_pages(store, limit, order, where, parameters) == matching

    where, parameters = metadata_filter(Query(metadata="null"))
    assert all_pages(store, limit, order, where, parameters) == [j["id"] for j in expected if j["metadata"] is None]
    store.close()


def test_what_is_added_while_paging_neither_repeats_nor_hides_the_rest(store):
    ids = [store.add({"object": JOB, "id": f"old-{n}"})["id"] for n in range(7)]
    new = iter(range(100))
    found = all_pages(store, 2, "desc", between=lambda: store.add({"object": JOB, "id": f"new-{next(new)}"}))
    assert found == ids[::-1]


def test_updates_from_many_threads_are_all_kept(store):
    store.add({"object": JOB, "id": "job", "count": 0})

    def count():
        for _ in range(25):
            with store.transaction():
                store.update(JOB, "job", count=store.get(JOB, "job")["count"] + 1)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get(JOB, "job")["count"] == 200
    assert len(store._idle) <= 9, "a thread that has ended leaves no connection behind"


def test_a_transaction_that_fails_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.add({"object": JOB, "id": "job"})
        with store.transaction():
            store.add({"object": EVENT, "id": "event"})
        raise ZeroDivisionError
    assert store.get(JOB, "job") is None and store.get(EVENT, "event") is None
    with pytest.raises(KeyError):
        store.update(JOB, "job", status="queued")


def test_a_file_appears_whole_or_not_at_all(store):
    path = store.file_path("file-1")
    with pytest.raises(ZeroDivisionError), store.writing(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        raise ZeroDivisionError
    assert not path.exists() and not list(store.temporary.iterdir())
    with store.writing(path) as file:
        file.write(b"whole")
    assert path.read_bytes() == b"whole"


def test_strays_are_removed_at_start_but_never_with_a_lost_database(tmp_path):
    first = Store(tmp_path)
    first.add({"object": "file", "id": "known"})
    first.close()
    for name in ("known", "stray"):
        (tmp_path / "files" / name).write_bytes(b"x")
    (tmp_path / "jobs" / "stray").mkdir()
    (tmp_path / "tmp" / "unfinished").write_bytes(b"x")
    Store(tmp_path).close()
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["known"]
    assert not list((tmp_path / "jobs").iterdir()) and not list((tmp_path / "tmp").iterdir())
    for path in tmp_path.glob("state.sqlite3*"):
        path.unlink()
    Store(tmp_path).close()
    assert (tmp_path / "files" / "known").exists()


def test_the_servers_own_keys_stay_with_it():
    assert public({"id": "x", "_base": "y"}) == {"id": "x"}
