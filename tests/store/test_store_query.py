"""Questions are SQL, and SQL here can only ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergectl.store import Store, StoreError, open_store


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = open_store(tmp_path_factory.mktemp("lab"))
    with store.start("eval", config={"x": 1}, name="one") as run:
        run.metric("score", 0.5, task="a/b", split="report")
    return store


def test_a_question_is_answered_with_columns_and_rows(filled: Store) -> None:
    table = filled.query("SELECT name, 1 AS n FROM runs WHERE name = ?", ["one"])
    assert (table.columns, table.rows, table.records()) == (["name", "n"], [("one", 1)], [{"name": "one", "n": 1}])


@pytest.mark.parametrize("sql", ["DESCRIBE runs", "SHOW TABLES", "SUMMARIZE runs", "WITH x AS (SELECT 1) FROM x"])
def test_looking_around_is_allowed(filled: Store, sql: str) -> None:
    assert filled.query(sql).rows


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO runs (run_id) VALUES ('x')",
        "WITH x AS (DELETE FROM runs RETURNING *) SELECT * FROM x",
        "DROP TABLE runs",
        "UPDATE runs SET name = 'x'",
        "CREATE TABLE memory.main.x (a INTEGER)",
        "ATTACH '{folder}/other.duckdb' AS other",
        "COPY runs TO '{folder}/runs.csv'",
        "EXPORT DATABASE '{folder}/export'",
        "SELECT * FROM read_csv('{folder}/secret.csv')",
        "SELECT * FROM read_text('{folder}/secret.csv')",
        "SELECT * FROM '{folder}/secret.csv'",
        "SELECT * FROM glob('{folder}/*')",
        "SET enable_external_access = true",
        "RESET lock_configuration",
        "PRAGMA enable_profiling",
        "INSTALL sqlite",
        "LOAD '{folder}/x.duckdb_extension'",
        "CHECKPOINT store",
        "USE memory",
        "SELECT 1; DROP TABLE runs",
        "EXPLAIN ANALYZE COPY runs TO '{folder}/runs.csv'",
        "SELECT * FROM path",
        "",
    ],
)
def test_a_query_can_neither_write_nor_attach_nor_read_files(filled: Store, tmp_path: Path, sql: str) -> None:
    (tmp_path / "secret.csv").write_text("a\n1\n")
    before = (filled.path.read_bytes(), sorted(tmp_path.rglob("*")))
    path = [1]
    with pytest.raises(StoreError):
        filled.query(sql.replace("{folder}", str(tmp_path)))
    assert (filled.path.read_bytes(), sorted(tmp_path.rglob("*")), path) == (*before, [1])


@pytest.mark.parametrize(
    ("sql", "sentence"),
    [
        ("SELECT * FROM runz", "Table with name runz does not exist.*Did you mean.*runs"),
        ("SELECT nam FROM runs", 'column "nam" not found.*Candidate'),
        ("SELEC 1", "syntax error at or near"),
        ("DROP TABLE runs", "read-only here: a SELECT can be asked, got DROP"),
        ("SELECT 1; SELECT 2", "One SELECT at a time, got 2 statements"),
    ],
)
def test_a_wrong_question_is_told_in_one_line(filled: Store, sql: str, sentence: str) -> None:
    with pytest.raises(StoreError, match=sentence) as told:
        filled.query(sql)
    assert "\n" not in str(told.value)


def test_a_question_that_takes_too_long_is_stopped(filled: Store) -> None:
    with pytest.raises(StoreError, match=r"longer than 0\.3 seconds"):
        filled.query("SELECT count(*) FROM range(100000000) a, range(100000) b WHERE random() < 0.1", limit=0.3)


def test_asking_where_nothing_is_says_so(untouched: Store) -> None:
    with pytest.raises(StoreError, match="There is no store at"):
        untouched.query("SELECT 1")
    assert not untouched.folder.exists()


def test_what_waits_in_the_inbox_is_in_the_answer(store: Store) -> None:
    for kind in ("eval", "merge"):
        store.start(kind, config={}).finish()
    assert store.query("SELECT kind FROM runs ORDER BY started_at").rows == [("eval",), ("merge",)]


def test_no_view_shows_a_number_that_is_not_finite(store: Store) -> None:
    with store.start("trial", config={"method": "ties"}, study="s", trial=0) as run:
        run.metric("score", float("nan"), task="a/b", split="tune")
        run.metric("score", 0.5, task="a/c", split="tune")
    assert store.query("SELECT value, best_so_far FROM trials").rows == [(0.5, 0.5)]
