"""`registry.sqlite`: an index of the records, to ask questions of. It is rebuilt from them at will, and never in git.

One process writes at a time, each write in one transaction that is begun as a write: SQLite's deferred transactions
fail at once when a read becomes a write beside another writer, whatever their timeout.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlite_utils import Database

from orchestrator.schema import APPLICATION, known, migrations, refresh_views
from orchestrator.versions import answers_digest, judges_digest, scores

if TYPE_CHECKING:
    from evals.findings import Findings
    from orchestrator.artifact import Store

WAIT = 30.0
"""Seconds to wait for another writer."""

TABLES_EMPTIED = (
    "detections",
    "detectors",
    "confusions",
    "comparisons",
    "metrics",
    "trials",
    "experiments",
    "node_inputs",
    "nodes",
)
"""What a rebuild makes anew, those that refer to others first."""

Values = Sequence[Any] | dict[str, Any]


class RegistryError(ValueError):
    """A registry that cannot be used; the message says why and what to do."""


class Registry:
    """The registry in the file `path`, made when it is not there. Close it, or use it in a `with` statement."""

    def __init__(self, path: str | Path, *, write: bool = True) -> None:
        """`write=False` opens an existing file for reading, and changes nothing in it. Raises RegistryError."""
        self.path = Path(path)
        self._write = write
        connection = _connection(self.path, write)
        try:
            self.db = Database(connection)
            with self._explained():
                self._open(connection)
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> Registry:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.db.conn.close()

    def query(self, sql: str, values: Values = ()) -> list[dict[str, Any]]:
        """Rows of a SELECT. Raises RegistryError for a statement that is wrong."""
        with self._explained():
            return list(self.db.query(sql, values))

    def leaderboard(self, experiment: str | None = None) -> list[dict[str, Any]]:
        """Rows of the leaderboard, of the latest experiment of each name or of one name, and of its other judges."""
        where = "where current" + (" and experiment = ?" if experiment is not None else "")
        values = () if experiment is None else (experiment,)
        return self.query(f"select * from leaderboard {where}", values)

    def confusions(self, experiment: str | None = None) -> list[dict[str, Any]]:
        """Confusion matrices of the latest experiment of each name or of one name; rows and cells as lists."""
        latest = "select distinct experiment_key, experiment, eval, judged_by from leaderboard where current"
        on = "l.experiment_key = c.experiment and l.eval = c.eval"
        sql = f"select l.experiment as name, l.judged_by, c.* from confusions c join ({latest}) l on {on}"
        found = self.query(sql + " order by 1, c.eval, c.student, l.judged_by")
        kept = [row for row in found if experiment in (None, row["name"])]
        return [{**row, **{name: json.loads(row[name]) for name in ("traits", "names", "cells")}} for row in kept]

    def detections(self, experiment: str | None = None) -> list[dict[str, Any]]:
        """What detectors said of the datasets of the latest experiment of each name or of one name."""
        found = self.query("select * from detection where current")
        return [row for row in found if experiment in (None, row["experiment"])]

    def index(
        self,
        records: Iterable[Mapping[str, Any]],
        failures: Iterable[Mapping[str, Any]] = (),
        findings_of: Callable[[str], Findings] | None = None,
    ) -> int:
        """Add or renew the nodes of `records` and `failures`, and what compare records found; how many records.

        `findings_of` reads the findings of a compare record by its key; without it experiments stay as they are.
        """
        with self._transaction():
            return self._index(records, failures, findings_of)

    def publish(
        self,
        key: str,
        name: str,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        findings: Findings,
        *,
        question: str = "",
        complete: bool = True,
        submitted_at: str | None = None,
        answers: Mapping[str, str | None] | None = None,
    ) -> None:
        """Add or renew an experiment from its compare node and findings; `complete`: no score is missing.

        `answers` are the answers behind the scores, by the scores' roles; without them those of indexed scores are.
        """
        with self._transaction():
            self._publish(key, name, params, inputs, findings, question, complete, submitted_at or _now(), answers)

    def rebuild(self, store: Store) -> int:
        """Empty the registry and index every record and failure of `store`; returns how many records.

        One transaction: whoever reads meanwhile sees the old registry, and so does everybody if it fails.
        """
        from evals import findings
        from orchestrator.stage import FINDINGS

        def findings_of(key: str) -> Findings:
            return findings.load(store.folder(key) / FINDINGS)

        failures = (failure for short in sorted(store.failed()) if (failure := store.failure(short)) is not None)
        with self._transaction():
            for table in TABLES_EMPTIED:
                self.db.execute(f"delete from {table}")
            return self._index(store.records(), failures, findings_of)

    def _open(self, connection: sqlite3.Connection) -> None:
        """Check whose file it is, and bring its tables and views up to date."""
        # in one statement, so that a registry which another process makes at this moment is not seen half made
        sql = "select application_id, (select count(*) from sqlite_master) from pragma_application_id"
        application, tables = connection.execute(sql).fetchone()
        foreign = application != APPLICATION and (application != 0 or tables)
        if foreign:
            raise RegistryError(f"{self.path} is another program's database; give another path with --registry")
        newer = {one.name for one in migrations.applied(self.db)} - known()
        if newer:
            raise RegistryError(
                f"{self.path} was written by a newer version of orch (migrations {', '.join(sorted(newer))}); "
                "update orch, or delete the file and run: orch registry rebuild"
            )
        connection.execute("pragma foreign_keys = on")
        if not self._write:
            if application != APPLICATION or migrations.pending(self.db):
                raise RegistryError(f"{self.path} is not up to date; run: orch registry rebuild")
            return
        connection.execute("pragma journal_mode = wal")  # where the file system has it; else it stays as it is
        with self._transaction():
            if application != APPLICATION:
                connection.execute(f"pragma application_id = {APPLICATION}")
            migrations.apply(self.db)
            refresh_views(self.db)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained():
            self.db.conn.execute("begin immediate")
            try:
                yield
            except BaseException:
                self.db.conn.rollback()
                raise
            self.db.conn.commit()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RegistryError(f"{self.path}: {error}; {_advice(error)}") from error

    def _index(
        self,
        records: Iterable[Mapping[str, Any]],
        failures: Iterable[Mapping[str, Any]],
        findings_of: Callable[[str], Findings] | None,
    ) -> int:
        count, compared = 0, []
        for record in records:
            self._node(_of_record(record), record["inputs"])
            count += 1
            if record["stage"] == "compare":
                compared.append(record)
        for failure in failures:
            self._node(_of_failure(failure), failure["inputs"])
        for record in compared if findings_of is not None else ():  # after all nodes: their inputs lead to the fits
            found = findings_of(record["key"])  # type: ignore[misc]
            question = record.get("runtime", {}).get("question", "")
            names = record["key"], record["label"], record["params"], record["inputs"]
            self._publish(*names, found, question, True, record["started"])
        return count

    def _node(self, row: dict[str, Any], inputs: Mapping[str, str]) -> None:
        self._insert("insert or replace", "nodes", row)
        self.db.conn.execute("delete from node_inputs where node = ?", [row["key"]])
        rows = [(row["key"], role, key) for role, key in inputs.items()]
        self.db.conn.executemany("insert into node_inputs values (?, ?, ?)", rows)

    def _publish(
        self,
        key: str,
        name: str,
        params: Mapping[str, Any],
        inputs: Mapping[str, str],
        findings: Findings,
        question: str,
        complete: bool,
        submitted_at: str,
        answers: Mapping[str, str | None] | None = None,
    ) -> None:
        self.db.conn.execute("delete from experiments where key = ?", [key])
        experiment = {
            "key": key,
            "name": name,
            "question": question,
            "spec": json.dumps(params),
            "complete": int(complete),
            "submitted_at": submitted_at,
            "answers": answers_digest(params, self._answers(inputs) if answers is None else answers),
            "judges": judges_digest(params),
        }
        self._insert("insert", "experiments", experiment)
        fits, units = self._behind(inputs, "state"), self._behind(inputs, "unit")
        for number, trial in enumerate(params["trials"]):
            shown = (trial["group"], trial["method"], trial["label"], trial["seed"], int(trial["baseline"]))
            unit = self._unit(units.get(number))
            self.db.conn.execute(
                "insert into trials values (?, ?, ?, ?, ?, ?, ?, ?, ?)", (key, number, *shown, fits.get(number), unit)
            )
        points = [(key, *astuple(point)) for point in findings.points]
        self.db.conn.executemany("insert into metrics values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", points)
        for row in findings.rows:
            columns = asdict(row)
            self._insert("insert", "comparisons", {"experiment": key, "group_key": columns.pop("group"), **columns})
        for table, found in (("detections", findings.detections), ("detectors", findings.detectors)):
            for each in found:
                self._insert("insert", table, {"experiment": key, **asdict(each)})
        for one in findings.confusions:
            plain = asdict(one)
            cells = {name: json.dumps(value) if isinstance(value, tuple) else value for name, value in plain.items()}
            self._insert("insert", "confusions", {"experiment": key, **cells})

    def _answers(self, inputs: Mapping[str, str]) -> dict[str, str | None]:
        """Role of a score -> key of the answer that it was made of, as far as scores are indexed."""
        sql = "select input from node_inputs where node = ? and role = 'answer'"
        found = {role: self.db.conn.execute(sql, [key]).fetchone() for role, key in scores(inputs).items()}
        return {role: None if row is None else row[0] for role, row in found.items()}

    def _behind(self, inputs: Mapping[str, str], role: str) -> dict[int, str]:
        """Trial -> key of what its answers read as `role`: compare reads scores, a score its answer, an answer that."""
        scores = {name.split("/")[0]: key for name, key in inputs.items() if name.split("/")[0].isdigit()}
        sql = """select behind.input from node_inputs answer
                 join node_inputs behind on behind.node = answer.input and behind.role = ?
                 where answer.node = ? and answer.role = 'answer'"""
        found = {trial: self.db.conn.execute(sql, [role, key]).fetchone() for trial, key in scores.items()}
        return {int(trial): row[0] for trial, row in found.items() if row is not None}

    def _unit(self, key: str | None) -> float | None:
        """The dose that a calibrate node found."""
        sql = "select json_extract(outputs, '$.unit') from nodes where key = ? and status = 'have'"
        row = None if key is None else self.db.conn.execute(sql, [key]).fetchone()
        return None if row is None else row[0]

    def _insert(self, verb: str, table: str, row: Mapping[str, Any]) -> None:
        columns = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join("?" * len(row))
        self.db.conn.execute(f"{verb} into {table} ({columns}) values ({marks})", list(row.values()))


def _of_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `nodes` from a node's record."""
    return {
        "key": record["key"],
        "stage": record["stage"],
        "label": record["label"],
        "status": "have",
        "method": record["params"].get("method") or record.get("runtime", {}).get("method"),
        "params": json.dumps(record["params"]),
        "outputs": json.dumps(record["outputs"]),
        "started_at": record["started"],
        "seconds": float(record["seconds"]),
        "peak_rss_mib": float(record["peak_rss_mib"]),
        "host": record["host"]["name"],
        "versions": json.dumps(record["packages"]),
    }


def _of_failure(failure: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `nodes` from a node's `failed.json`."""
    return {
        "key": failure["key"],
        "stage": failure["stage"],
        "label": failure["label"],
        "status": "failed",
        "method": failure["params"].get("method"),
        "params": json.dumps(failure["params"]),
        "started_at": failure["at"],
        "host": failure["host"],
        "error": failure["traceback"],
        "attempts": failure["attempts"],
    }


def _connection(path: Path, write: bool) -> sqlite3.Connection:
    """Raises RegistryError where there can be no file, or, for reading, is none."""
    if path.is_dir():
        raise RegistryError(f"the registry {path} is a folder; give a file, e.g. {path / 'registry.sqlite'}")
    if not write and not path.exists():
        raise RegistryError(f"there is no registry at {path}; make it with: orch registry rebuild")
    if write and not path.parent.is_dir():
        raise RegistryError(
            f"the registry {path} would lie in a folder that is not there; make the folder {path.parent} first"
        )
    mode = "mode=rwc" if write else "mode=ro"
    log = path.with_name(path.name + "-wal")
    if not write and not log.exists() and not os.access(path.parent, os.W_OK):
        mode += "&immutable=1"  # a file in write-ahead mode needs files beside it, which cannot be made here
    try:
        uri = f"{path.absolute().as_uri()}?{mode}"
        return sqlite3.connect(uri, uri=True, timeout=WAIT, isolation_level=None)
    except sqlite3.Error as error:
        raise RegistryError(f"{path}: {error}; {_advice(error)}") from error


def _advice(error: sqlite3.Error) -> str:
    """What to do about an error of SQLite's."""
    text = str(error)
    if isinstance(error, sqlite3.IntegrityError):
        return "nothing was written; a row with such a value must not enter the leaderboard"
    if "not a database" in text or "malformed" in text:
        return "it is damaged, and only an index: delete it and run: orch registry rebuild"
    if "readonly" in text or "unable to open" in text:
        return "it cannot be written here; give another path with --registry"
    if "locked" in text:
        return f"another process has been writing for {WAIT:g} seconds; wait for it, or end it"
    return "tables and views are listed by: sqlite-utils schema FILE"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
