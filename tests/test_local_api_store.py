"""Properties of the store: paging and filters against a plain list, transactions under threads, atomic files."""

import shutil
import sqlite3
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from local_api.jobs import metadata_filter
from local_api.store import EVENT, JOB, Store, StoreError, event_id, public

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


def test_a_start_moves_strays_and_deletes_nothing(tmp_path, caplog):
    first = Store(tmp_path)
    first.add({"object": "file", "id": "known"})
    first.close()
    for name in ("known", "stray"):
        (tmp_path / "files" / name).write_bytes(b"x")
    (tmp_path / "jobs" / "ftjob-stray").mkdir()
    (tmp_path / "tmp" / "unfinished").write_bytes(b"x")
    Store(tmp_path).close()
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["known"]
    assert (tmp_path / "strays" / "files" / "stray").exists() and (
        tmp_path / "strays" / "jobs" / "ftjob-stray"
    ).is_dir()
    assert [record.getMessage() for record in caplog.records] == [
        f"Not in the database, so moved to {tmp_path / 'strays'}: stray, ftjob-stray"
    ]
    assert not list((tmp_path / "jobs").iterdir()) and not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize("lost", ["gone", "empty", "older"])
def test_with_a_lost_database_nothing_goes_and_with_the_right_one_all_is_back(tmp_path, lost):
    database, saved, older = (tmp_path / name for name in ("state.sqlite3", "saved", "older"))
    first = Store(tmp_path)
    first.close()
    shutil.copy(database, older)
    first.add({"object": "file", "id": "file-1"})
    first.add({"object": JOB, "id": "ftjob-1"})
    first.close()
    (tmp_path / "files" / "file-1").write_bytes(b"x")
    (tmp_path / "jobs" / "ftjob-1").mkdir()
    (tmp_path / "jobs" / "ftjob-1" / "resume.pt").write_bytes(b"work")
    shutil.copy(database, saved)
    for _ in range(2):
        if lost == "older":
            shutil.copy(older, database)
        else:
            database.unlink()
            database.write_bytes(b"") if lost == "empty" else None
        Store(tmp_path).close()
        assert (tmp_path / "strays" / "jobs" / "ftjob-1" / "resume.pt").read_bytes() == b"work"
        shutil.copy(saved, database)
        Store(tmp_path).close()
        assert (tmp_path / "jobs" / "ftjob-1" / "resume.pt").read_bytes() == b"work"
        assert (tmp_path / "files" / "file-1").exists()


def test_a_database_that_cannot_be_used_is_a_sentence_and_nothing_is_touched(tmp_path):
    store = Store(tmp_path)
    for number in range(300):
        store.add({"object": "file", "id": f"file-{number}", "filename": "x" * 100})
    store.close()
    (tmp_path / "files" / "file-1").write_bytes(b"x")
    database = tmp_path / "state.sqlite3"
    whole = database.read_bytes()
    for content, said in ((b"not a database at all" * 100, "is damaged"), (whole[: len(whole) // 2], "is damaged")):
        database.write_bytes(content)
        with pytest.raises(StoreError, match=said):
            Store(tmp_path)
        assert database.read_bytes() == content and (tmp_path / "files" / "file-1").exists()
    for sql, said in (
        ("CREATE TABLE notes (text)", "not a database of this server"),
        ("PRAGMA user_version = 99", "newer"),
    ):
        database.unlink()
        with sqlite3.connect(database) as other:
            other.execute(sql)
        with pytest.raises(StoreError, match=said):
            Store(tmp_path)
        assert (tmp_path / "files" / "file-1").exists()


def test_a_database_of_the_first_version_is_upgraded_after_a_copy(tmp_path):
    store = Store(tmp_path)
    store.add({"object": JOB, "id": "ftjob-1"})
    event = {"object": EVENT, "id": "ftevent-random", "type": "metrics", "data": {"step": 3}}
    store.add(event, "ftjob-1")
    store._query("PRAGMA user_version = 0")
    store.close()
    store = Store(tmp_path)
    assert store.find(EVENT) == [{**event, "id": event_id("ftjob-1", "step 3")}]
    with sqlite3.connect(tmp_path / "state.sqlite3.version-0") as copy:
        assert copy.execute("SELECT id FROM objects WHERE kind = ?", (EVENT,)).fetchall() == [("ftevent-random",)]
    store.close()
    assert not Store(tmp_path).add_once(store.get(EVENT, event_id("ftjob-1", "step 3")), "ftjob-1")


def test_the_servers_own_keys_stay_with_it():
    assert public({"id": "x", "_base": "y"}) == {"id": "x"}
